"""Sets of trained activations: saved to a folder, sent to the Hub, loaded strictly and frozen."""

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparta_act.activations import Sparta
from sparta_act.errors import WeightsError, readable
from sparta_act.pretrained import fetching
from sparta_act.pretrained.card import model_card
from sparta_act.pretrained.files import pack, unpack
from sparta_act.pretrained.folder import CARD, name_of, write
from sparta_act.pretrained.hub import Found, locate, reason
from sparta_act.pretrained.labels import labelled
from sparta_act.pretrained.parsing import too_deep

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from typing_extensions import Self


class SpartaSet(Mapping[str, Sparta]):
    """Activations by site label, `"G1.B2"` to `Sparta`; `info`, a dictionary, says where they come from.

    The modules are the ones given, not copies. Raises `WeightsError` for what is no `Sparta`.

    >>> SpartaSet({"G1.B2": Sparta(16)}, {"backbone": "ResNet-18"})["G1.B2"].in_channels
    16
    """

    def __init__(self, mapping: Mapping[str, Sparta], info: Mapping[str, Any] | None = None) -> None:
        for value, what in ((mapping, "a set is made of"), ({} if info is None else info, "info is")):
            if not isinstance(value, Mapping):
                example = '{"G1.B2": Sparta(16)}, {"backbone": "ResNet-18"}'
                raise WeightsError(
                    f"{what} a dictionary, as in SpartaSet({example}), not {type(value).__name__}"
                )
        wrong = [f"{k!r} ({type(a).__name__})" for k, a in mapping.items() if not isinstance(a, Sparta)]
        unnamed = [
            repr(k) for k in mapping if not isinstance(k, str) or not 0 < len(k) <= 200 or not k.isprintable()
        ]
        problems = [f"not a Sparta: {', '.join(wrong)}"] if wrong else []
        problems += [f"not a label: {', '.join(unnamed)}"] if unnamed else []
        problems += ["its info has too many lists and dictionaries in each other"] if too_deep(info) else []
        if problems or not mapping:
            raise WeightsError(
                'SpartaSet maps site labels to Sparta modules, e.g. {"G1.B2": Sparta(16)}; '
                + (readable("; ".join(problems)) or "it cannot be empty")
            )
        try:
            self.info = copy.deepcopy(dict(info or {}))
        except Exception as error:  # of a result that still has a gradient, or a file
            raise WeightsError(
                f"info holds what cannot be copied ({reason(error)}): give numbers and texts, as loss.item()"
            ) from error
        self._activations = dict(mapping)

    @classmethod
    def of(cls, model: nn.Module, info: Mapping[str, Any] | None = None) -> "Self":
        """Every `Sparta` of an edited network as a set: the network's own modules, not copies.

        Labels are those of the sites where `replace_relus` put them, "G1.B2"; for others the dotted name in
        the network, without `module.` or `_orig_mod.` of wrappers. Where a label would be there twice, as in
        a network of two backbones, those go by their dotted names.
        Raises `WeightsError` where there is no `Sparta`.

        >>> SpartaSet.of(net, {"backbone": "ResNet-18"}).save_pretrained("my-set")  # doctest: +SKIP
        """
        if not isinstance(model, nn.Module):
            raise WeightsError(f"SpartaSet.of takes a network, an nn.Module, not a {type(model).__name__}")
        if not (activations := labelled(model)):
            raise WeightsError(
                f"there is no Sparta in this {type(model).__name__}: put some in with "
                'replace_relus(model, "G*.B-1") and train them, then make the set'
            )
        return cls(activations, info)

    def __getitem__(self, label: str) -> Sparta:
        if label not in self._activations:
            raise KeyError(f"no site {label!r} in this set, which has {list(self)}")
        return self._activations[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __repr__(self) -> str:
        return "\n".join(["SpartaSet(", *(f"  ({k}): {a!r}" for k, a in self.items()), ")"])

    def freeze(self) -> "Self":
        """Freeze every activation, in place; return the set."""
        for activation in self.values():
            activation.freeze()
        return self

    def unfreeze(self) -> "Self":
        """Let every activation train again, in place; return the set."""
        for activation in self.values():
            activation.unfreeze()
        return self

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float16,
        card: "str | ModelCard | None" = None,
    ) -> Path:
        """Write the set's three files into `folder`, made if needed, and return it.

        These weights are float16 on disk (float32 with `dtype=torch.float32`), and load as float32. Other
        files there stay. The model card is made from `info` unless `card` is given: `info["license"]`,
        `info["base_model"]` and `info["dataset"]` are in the Hub's terms, `info["measured"]` has the errors.
        Whenever it ends, even killed, the set that was there loads, or the new one.
        Raises `WeightsError` for weights which `dtype` (float16 or float32) cannot hold, for a folder with
        files of those names that are no set's, and where nothing can be written.
        """
        name = name_of(folder)
        if not name or name.startswith("~"):
            raise WeightsError(
                f"a set is saved into a folder, not into {readable(repr(folder), 300)}; nothing was written. "
                f'Name one, e.g. save_pretrained("my-set")'
            )
        write(self._files(Path(name).absolute().name, dtype, card), Path(name))
        return Path(name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Add SPARTA activations",
        dtype: torch.dtype = torch.float16,
        card: "str | ModelCard | None" = None,
    ) -> str:
        """Send the set to the Hub and return the commit, which `from_pretrained(revision=...)` takes.

        The files are those of `save_pretrained`: float16 on disk, and a card made from `info`. The license is
        `info["license"]`, as the Hub names it ("apache-2.0"); without it, the card names none.
        The repository and the branch `revision` are made if needed. Files of those names are replaced, even
        those of another model, as by any push to the Hub, which keeps its history; other files stay.
        Raises `WeightsError` if the Hub refuses, or if the repository exists and `private` contradicts it.
        """
        from huggingface_hub import HfApi

        files = self._files(repo_id, dtype, card)
        with tempfile.TemporaryDirectory() as folder:
            write(files, Path(folder))
            api = HfApi(token=token)
            try:
                fetching.within(fetching.WAIT, lambda: api.repo_exists(repo_id))  # the rest waits for ever
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
                    f"cannot send the set to {repo_id!r} on {api.endpoint}: {reason(error)}. Check the name, "
                    f"the network, and that `token` may write there"
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

        The weights are float16 on disk, unless they were saved otherwise. `name_or_path` is a folder, else
        the short name of a set of ours, which `list_sets` shows, in the package or on the Hub as
        `sparta-act/<name>`, else `organization/name` there. `revision` pins a branch, tag or commit.
        Raises `WeightsError`, and loads nothing, if anything is missing or changed.

        >>> activations = Sparta.from_pretrained("folder")  # doctest: +SKIP
        """
        found = locate(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        try:
            return _load(found)
        except WeightsError as error:
            if found.again is None:
                raise
            broken = error
        try:
            found = found.again()  # in case it was broken on the way, or is in the cache
        except WeightsError as error:
            raise broken from error
        return _load(found)

    def _files(self, name: str, dtype: torch.dtype, card: "str | ModelCard | None") -> dict[str, bytes]:
        info = {**self.info, "version": self.info.get("version", _version())}
        files = pack(self, info, dtype)
        card = model_card(name, self, info, str(dtype).removeprefix("torch.")) if card is None else card
        return {CARD: str(card).encode(errors="replace"), **files}


Sparta.from_pretrained = staticmethod(SpartaSet.from_pretrained)


@torch.inference_mode(False)  # tensors made in it would get no gradients for good
def _load(found: Found) -> SpartaSet:
    try:
        found.check()
        return SpartaSet(*unpack(found.folder)).freeze()
    except WeightsError as error:
        name = readable(repr(found.name), 300)
        raise WeightsError(
            f"cannot load {name} from {found.folder}: {readable(error)}; nothing was loaded. {found.advice}"
        ) from None  # the text has all that the cause says


def _version() -> str:
    try:
        return metadata.version("sparta-act")
    except metadata.PackageNotFoundError:  # imported from a copy that was never installed
        return "unknown"
