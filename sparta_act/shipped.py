"""Sets of activations which ship inside this package, in `sparta_act/sets/<name>/`."""

SHIPPED: dict[str, dict[str, str]] = {  # name of the set -> file -> its sha256
    "cifar10-resnet18-w16": {
        "README.md": "ad509de26d54f41c44dd850e90813d9f38e733ae02dc8265b1a5064139293cc0",
        "config.json": "5ad390e262c423afbac857dd507f23370c887b2bff84eec7ec9e4955cca38dea",
        "model.safetensors": "733d809720d24ac978667b3cb4d4c8bc672faecca85f8fa12a8d80b599e1a1a1",
    },
}
