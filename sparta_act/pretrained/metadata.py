"""The part of a model card that the Hub reads: only what `info` names, in the Hub's own terms."""

import math
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparta_act.errors import readable

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

REPO = r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+"  # organization/name
WORD = r"[a-z0-9][a-z0-9.-]{0,99}"  # "apache-2.0", "image-classification"
TAGS = ["activation-function", "adversarial-robustness", "pytorch", "sparta"]


def metadata(name: str, info: Mapping[str, Any]) -> "ModelCardData":
    """Metadata of a card; the Hub would refuse what is not in its own form, so that is left to the text.

    `info["license"]`: as the Hub names it, "apache-2.0". `info["base_model"]`, `info["dataset"]`:
    "organization/name", or several in a list. `info["pipeline_tag"]`: "image-classification". With a data
    set, the numbers of `info["measured"]` are the model's results.
    """
    from huggingface_hub import ModelCardData

    license, task = (_words(info.get(key), WORD) for key in ("license", "pipeline_tag"))
    datasets, bases = (_words(info.get(key), REPO) for key in ("dataset", "base_model"))
    for key, found, form in (("license", license, "apache-2.0"), ("base_model", bases, "organization/name")):
        if info.get(key) is not None and not found:
            given = readable(repr(info[key]), 100)
            text = f'info["{key}"] is {given}, which the Hub would refuse: it takes the form "{form}"'
            warnings.warn(f"{text}. Now only the text of the card names it", stacklevel=5)
    task_type = task[0] if task else "image-classification"
    results = _results(info.get("measured"), task_type, datasets[0]) if datasets else None
    return ModelCardData(
        library_name="sparta-act",
        license=license[0] if license else None,
        base_model=bases or None,
        pipeline_tag=task[0] if task else None,
        tags=list(TAGS),
        datasets=datasets or None,
        model_name=name if results else None,
        eval_results=results,
    )


def _results(measured: Any, task: str, dataset: str) -> "list[EvalResult] | None":
    """What `measured` has in numbers: {"clean": 37.5}, or rows {"error": "clean", "SPARTA": "37.5%"}."""
    from huggingface_hub import EvalResult

    if isinstance(measured, list):
        rows = [(r.get("error"), r.get("SPARTA")) for r in measured if isinstance(r, Mapping)]
    else:
        rows = [*measured.items()] if isinstance(measured, Mapping) else []
    found = [(name, *number) for name, value in rows if isinstance(name, str) and (number := _number(value))]
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="error",
            metric_name=f"{name}{unit}",
            metric_value=value,
        )
        for name, value, unit in found
        if name.isprintable()
    ] or None


def _number(value: Any) -> tuple[float, str] | None:
    """A number and its unit, if there is one: 37.5, or "37.5% (36.6-38.5)"."""
    if isinstance(value, str) and (percent := re.match(r"(\d+(?:\.\d+)?)%", value)):
        return float(percent[1]), " (%)"
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value, ""
    return None


def _words(value: Any, form: str) -> list[str]:
    """The texts of that form: of one text or of a list."""
    texts = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
    lowered = [text.lower() for text in texts] if form == WORD else texts
    return [text for text in lowered if re.fullmatch(form, text)]
