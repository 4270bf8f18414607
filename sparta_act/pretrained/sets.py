"""Sets of trained activations: saved to a folder, sent to the Hub, loaded strictly and frozen."""

import copy
import os
import tempfile
import textwrap
from collections.abc import ItemsView, Iterator, KeysView, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import HfApi, ModelCard
from torch import nn

from sparta_act.activations import Sparta
from sparta_act.errors import WeightsError
from sparta_act.pretrained.card import model_card
from sparta_act.pretrained.files import CARD, pack, unpack, write
from sparta_act.pretrained.hub import locate, reason

if TYPE_CHECKING:
    from typing_extensions import Self


class SpartaSet(nn.ModuleDict):
    """Activations by site label, `"G1.B2"` to `Sparta`; `info`, a dictionary, says where they come from.

    The modules are the ones given, not copies. Raises `WeightsError` for what is no `Sparta`.

    >>> SpartaSet({"G1.B2": Sparta(16)}, {"backbone": "ResNet-18"})["G1.B2"].in_channels
    16
    """

    def __init__(self, mapping: Mapping[str, Sparta], info: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.info = copy.deepcopy(dict(info or {}))
        wrong = [
            f"{label!r}: {type(activation).__name__}"
            for label, activation in mapping.items()
            if not isinstance(activation, Sparta) or not label or "/" in label or hasattr(self, label)
        ]
        if wrong or not mapping:
            raise WeightsError(
                f"asked for a set of {wrong or 'nothing'}; give at least one Sparta module by the label of "
                f"its site, such as 'G1.B2', which has no '/' and is no name of a method"
            )
        self.update(mapping)

    def freeze(self) -> "Self":
        """Change every activation to stay as it is: no gradient to its parameters."""
        for _, activation in self.items():
            activation.freeze()
        return self

    def unfreeze(self) -> "Self":
        """Change every activation back to one that trains."""
        for _, activation in self.items():
            activation.unfreeze()
        return self

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float16,
        card: str | ModelCard | None = None,
    ) -> Path:
        """Write the set's three files into `folder`, made where need be, and return it.

        Other files there stay. The model card is made from `info` where none is given.
        Raises `WeightsError`, and writes nothing, for weights which `dtype` (float16 or float32) cannot hold.
        """
        files = self._files(Path(folder).absolute().name, dtype, card)
        write(files, Path(folder))
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Add SPARTA activations",
        dtype: torch.dtype = torch.float16,
        card: str | ModelCard | None = None,
    ) -> str:
        """Send the set to the Hub and return the commit, which `from_pretrained(revision=...)` takes.

        The repository and the branch `revision` are made where need be; other files there stay.
        Raises `WeightsError` where the Hub refuses, or if the repository exists and is not as `private` says.
        """
        files = self._files(repo_id, dtype, card)
        with tempfile.TemporaryDirectory() as folder:
            write(files, Path(folder))
            api = HfApi(token=token)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                if private is not None and api.model_info(repo_id).private is not private:
                    raise WeightsError(f"it exists already with private={not private}; change it on the Hub")
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
                )
            except Exception as error:  # of requests, httpx or httpx2, by the version of huggingface-hub
                raise WeightsError(
                    f"asked to send a set to {repo_id!r} on {api.endpoint}, found {reason(error)}; "
                    f"check the name, the network, and that `token` may write there"
                ) from error
        return commit.oid

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "SpartaSet":
        """Load a set, frozen, in float32 on the CPU: from a folder, from this package, or from the Hub.

        `name_or_path` is a folder, else the short name of a set of ours, which lies in the package or on the
        Hub as `sparta-act/<name>`, else `organisation/name` there. `revision` pins a branch, tag or commit.
        Raises `WeightsError`, and loads nothing, where anything is not as it should be.

        >>> activations = Sparta.from_pretrained("folder")  # doctest: +SKIP
        """
        folder = locate(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        try:
            return SpartaSet(*unpack(folder)).freeze()
        except WeightsError as error:
            raise WeightsError(
                f"asked for {os.fspath(name_or_path)!r}, found in {folder}: {error}; nothing was loaded. "
                f"Get the set again from where it was made, or save it again with save_pretrained"
            ) from error

    def _files(self, name: str, dtype: torch.dtype, card: str | ModelCard | None) -> dict[str, bytes]:
        info = {**self.info, "version": _version()}
        files = pack(dict(self.items()), info, dtype)
        card = model_card(name, dict(self.items()), info) if card is None else card
        return {CARD: str(card).encode(), **files}

    def __getitem__(self, key: str) -> Sparta:
        if key not in self:
            raise KeyError(f"no site {key!r} in this set, which has {list(self)}")
        return cast(Sparta, self._modules[_child(key)])

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self.add_module(_child(key), module)

    def __delitem__(self, key: str) -> None:
        del self._modules[_child(key)]

    def __iter__(self) -> Iterator[str]:
        return map(_child, self._modules)

    def __contains__(self, key: str) -> bool:
        return _child(key) in self._modules

    def keys(self) -> KeysView[str]:
        """Labels of the sites."""
        return dict(self.items()).keys()

    def items(self) -> ItemsView[str, Sparta]:
        """Labels of the sites, each with its activation."""
        return {label: self[label] for label in self}.items()

    def __repr__(self) -> str:
        lines = [f"({label}): {activation!r}" for label, activation in self.items()]
        return "\n".join(["SpartaSet(", *(textwrap.indent(line, "  ") for line in lines), ")"])


Sparta.from_pretrained = staticmethod(SpartaSet.from_pretrained)


def _child(label: str) -> str:
    return label.translate(str.maketrans("./", "/."))  # the name of a child may hold no dot; its own inverse


def _version() -> str:
    try:
        return metadata.version("sparta-act")
    except metadata.PackageNotFoundError:  # imported from a copy which was never installed
        return "unknown"
