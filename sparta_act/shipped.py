"""Sets of activations which ship inside this package, in `sparta_act/sets/<name>/`."""

SHIPPED: dict[str, dict[str, str]] = {}  # name of the set -> file -> its sha256
