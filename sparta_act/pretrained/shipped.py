"""The sets of sparta-act by their short names, and what their files must be.

All of them lie in a checkout, in `sparta_act/sets/<name>/`; pyproject.toml says which go into the wheel. The
others are fetched from the Hub, `sparta-act/<name>`. A set does not change: what is better gets another name.
"""

SHIPPED: dict[str, dict[str, str]] = {  # name of the set -> file -> its sha256
    "cifar10-resnet18-w16": {
        "README.md": "3845f2e2dfbed4e3d3951b912bc166000355329628cfd448eb58761c31196570",
        "config.json": "d0d8be49726b272046cf41289ce58732e9bfc8db8d46c7ac6abe35334b0d60d9",
        "model.safetensors": "38d55159c92fcdd7b5e66379412010931d0ae1a57bdefccf0724cd10190eef7c",
    },
}
