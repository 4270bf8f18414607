"""The sets of sparta-act by their short names, and what their files must be.

All of them lie in a checkout, in `sparta_act/sets/<name>/`; pyproject.toml says which go into the wheel. The
others are fetched from the Hub, `sparta-act/<name>`. A set does not change: what is better gets another name.
"""

SHIPPED: dict[str, dict[str, str]] = {  # name of the set -> file -> its sha256
    "cifar10-resnet18-w16": {
        "README.md": "be0c4ff1cc3d9f5939148f05c0eb86ac18e3df2c64093e38bdc018aa2a8af6fa",
        "config.json": "1af0540658e233d9e63fd035f9d8f907ce31ac19b49418a669b61c2a7a22fd92",
        "model.safetensors": "733d809720d24ac978667b3cb4d4c8bc672faecca85f8fa12a8d80b599e1a1a1",
    },
}
