"""Sets of activations which ship inside this package, in `sparta_act/sets/<name>/`."""

SHIPPED: dict[str, dict[str, str]] = {  # name of the set -> file -> its sha256
    "cifar10-resnet18-w16": {
        "README.md": "6b42c2ce059548776e87f89d4e996fb614825a35410930e64b0480f12307da04",
        "config.json": "c4cca7bda82ed97de1a0a80026858120b79ba60688f27749c4b81729f71c622a",
        "model.safetensors": "2a6846c51b7e95bd2373b3b29b4e54b1e63ddbb691a8ad76be468572597ce17d",
    },
}
