"""The sets of sparta-act by their short names, and what their files must be.

All of them lie in a checkout, in `sparta_act/sets/<name>/`; pyproject.toml says which go into the wheel. The
others are fetched from the Hub, `sparta-act/<name>`. A set does not change: what is better gets another name.
"""

SHIPPED: dict[str, dict[str, str]] = {  # name of the set -> file -> its sha256
    "cifar10-resnet18-w16": {
        "README.md": "357b6fc2ee075fd4895632f1074d04406e08c53edabec444ef231c51276e891a",
        "config.json": "33b9908d05830b6e5c2119b89367a8c1ae5f2b42ec84f24e8669baaa7ce36063",
        "model.safetensors": "38d55159c92fcdd7b5e66379412010931d0ae1a57bdefccf0724cd10190eef7c",
    },
}
