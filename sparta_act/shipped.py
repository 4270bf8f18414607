"""The sets of sparta-act by their short names, and what their files must be.

All of them lie in a checkout, in `sparta_act/sets/<name>/`; pyproject.toml says which go into the wheel. The
others are fetched from the Hub, `sparta-act/<name>`. A set does not change: what is better gets another name.
"""

SHIPPED: dict[str, dict[str, str]] = {  # name of the set -> file -> its sha256
    "cifar10-resnet18-w16": {
        "README.md": "357b6fc2ee075fd4895632f1074d04406e08c53edabec444ef231c51276e891a",
        "config.json": "110a0961f985af02495d9d2cf3a1a677c3d832beb8576054528bb4e37adde716",
        "model.safetensors": "c9ab024e0a364351d990f0098ee4739a5f128e4bd35654a708a50e8603ca39b2",
    },
}
