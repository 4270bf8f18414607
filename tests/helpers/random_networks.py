"""Writes random networks of which it is known, by the way they are written, what the surgery must do.

`write(seed)` gives two source texts: a network, and its twin, in which a person has put `self.spot` at the last
ReLU of each block. A text of ours marks such a call as «F.relu(h)|h»: the call, and what goes into it.
"""

import random
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.helpers.random_parts import (
    EDIT,
    LASTS,
    MAY,
    PARTS,
    PLAIN,
    PRELUDE,
    REFUSE,
    SPOT,
    STAGES,
    UNITS,
    UNSEEN,
    Part,
)


class Block(NamedTuple):
    """What is true of a block of the network."""

    label: str
    truth: int
    parts: tuple[str, ...]  # its unusual features, in words


@dataclass
class Written:
    """A network, its twin and the truth."""

    seed: int
    text: str
    twin: str
    blocks: list[Block]
    dimensions: int


@dataclass
class _Class:
    """The source of a class of blocks, or of a part of one."""

    name: str
    init: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    truth: int = EDIT
    words: list[str] = field(default_factory=list)

    def text(self, head: str, takes: str, x: str) -> str:
        body = "\n".join(self.lines)
        spot = (
            [f'vars(self)["spot"] = Spot({head})']
            if "self.spot" in _read(body + str(self.methods), True)
            else []
        )
        lines = [f"class {self.name}(nn.Module):", "    flag = False", f"    def __init__(self, {takes}):"]
        lines += [" " * 8 + i for i in ["super().__init__()", *self.init]]
        lines += [f"        #SPOT {s}" for s in spot]
        for method in self.methods:
            lines += ["    " + m for m in method.splitlines()]
        lines += [f"    def forward(self, {x}):", *(" " * 8 + i for i in body.splitlines())]
        return "\n".join(lines)


def _read(text: str, twin: bool) -> str:
    """The text of a network, or of its twin."""

    def call(match: re.Match[str]) -> str:
        original, argument = match[1].rsplit("|", 1)
        original, _, raw = original.partition("||")
        if not twin:
            return original
        if raw or argument.startswith("!"):
            return argument[1:]
        return "self.spot" if argument == "=" else f"self.spot({argument})"

    text = re.sub("«(.*?)»", call, text, flags=re.DOTALL)
    return text.replace("#SPOT ", "") if twin else re.sub(".*#SPOT .*\n", "", text)


class _Writer:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.dimensions = self.rng.choice([2, 2, 2, 2, 2, 1, 3])
        self.classes: list[str] = []
        self.made: dict[str, tuple[int, list[str]]] = {}  # the truth and the words of the classes of blocks
        self.count = 0

    def likely(self, chance: float) -> bool:
        return self.rng.random() < chance

    def spelled(self, text: str, to: _Class, spellings: tuple[str, ...] = PLAIN) -> str:
        """The text with a way to call ReLU for each RELU(...)."""
        while (start := text.find("RELU(")) >= 0:
            depth, end = 0, start + 4
            while True:
                depth += (text[end] == "(") - (text[end] == ")")
                if not depth:
                    break
                end += 1
            spelling = self.rng.choice(spellings)
            if "self.relu" in spelling and not any("self.relu =" in i for i in to.init):
                spelling = PLAIN[0]
            if "self.own" in spelling:
                self.count += 1
                spelling = spelling.replace("self.own", f"self.own{self.count}")
                to.init.append(f"self.own{self.count} = nn.ReLU()")
            text = text[:start] + spelling.format(text[start + 5 : end]) + text[end + 1 :]
        return text

    def add(self, part: Part, to: _Class, channels: str, inplace: str = "False", child: bool = False) -> None:
        """Put a part into a class, or into a child module of its own."""
        target = to
        if child:
            self.count += 1
            target = _Class(f"Part{self.count}")
            to.init.append(f"self.part{self.count} = {target.name}({channels})")
            to.lines.append(f"h = self.part{self.count}(h)")
            channels = "C"
        spellings = UNSEEN if part.truth == REFUSE else PLAIN
        init = (
            part.init.replace("|»", f"|!Spot({inplace})»")
            .replace("C,", f"{channels},")
            .replace("C)", f"{channels})")
        )
        target.init += init.splitlines()
        target.methods += [part.methods] if part.methods else []
        target.lines += self.spelled(part.lines, target, spellings).splitlines()
        if child:
            target.lines.append("return h")
            self.classes.append(target.text(inplace, "C", "h").replace("INPLACE", inplace))
        to.truth = max(to.truth, part.truth)

    def block(self) -> str:
        """Write a class of blocks; its name."""
        rng = self.rng
        self.count += 1
        cls = _Class(f"Block{self.count}")
        last: Part = rng.choice(LASTS) if self.likely(0.7) else LASTS[0]
        inplace = str(self.likely(0.4) if last.inplace is None else last.inplace)
        kind = rng.choice(["basic", "basic", "bottleneck", "pre-activation", "inner"])
        words = cls.words
        words += [kind, last.name + (", in place" if inplace == "True" else "")]
        mid = rng.choice(["outputs", "outputs", "2 * outputs"])
        first = "inputs" if kind == "pre-activation" else mid
        second = mid if kind == "pre-activation" else "outputs"
        cls.init += [
            f"self.conv1, self.norm1 = conv(inputs, {mid}, 3, stride), norm({first})",
            f"self.conv2, self.norm2 = conv({mid}, outputs), norm({second})",
            "self.shortcut = nn.Sequential()",
            "if stride > 1 or inputs != outputs:",
        ]
        if self.likely(0.25):
            cls.init.append(
                "    self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.ReLU(), conv(outputs, outputs, 1))"
            )
            words.append("shortcut with ReLU")
        else:
            cls.init.append(
                "    self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))"
            )
        late, into_x = self.likely(0.4), False
        lines = cls.lines
        if not late:
            lines.append("s = self.shortcut(x)")
        elif kind in ("pre-activation", "inner") and "shortcut with ReLU" in words:
            words.append("computed late")
        if self.likely(0.1):
            lines += ["if self.training and random.random() < 0.3:", "    return self.shortcut(x)"]
            words.append("leaves early at random")
        chosen = [rng.choice(PARTS) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
        early = [p for p in chosen if p.place != "after" and (p.place == "before" or self.likely(0.4))]
        after = [p for p in chosen if p not in early]
        kept = rng.choice(["feature", "view", "hook", "feature after"]) if self.likely(0.15) else ""
        add = rng.choice(["h = h + s", "h += s", "h = torch.add(h, s)", "h = s + h", "s += h\nh = s"])
        child = last.movable and not kept and self.likely(0.25)
        own = not child and "self.relu(" in last.lines  # one module called at several places
        if own and self.likely(0.6):
            middle = lambda x: f"self.relu({x})"  # noqa: E731
        else:
            middle = lambda x: self.spelled(f"RELU({x})", cls)  # noqa: E731

        def parts(several: list[Part], channels: str) -> None:
            for part in several:
                if part.name in words:
                    continue
                words.append(part.name)
                truth = cls.truth
                self.add(part, cls, channels, child=part.movable and self.likely(0.5))
                if part in early and part.truth == REFUSE:  # before the last call it does no harm
                    cls.truth = truth
                lines.extend([])

        def last_relu(fresh: bool) -> None:
            aliased = kept in ("feature", "view") or (kept == "hook" and not fresh)
            aliased &= "- 0.1" not in last.lines and "conv(" not in last.init
            if kept == "feature":
                lines.append("self.feature = h")
            elif kept == "view":
                lines.append("view = h[:, 1:]")
            elif kept == "hook":
                cls.init.append("self.norm2.register_forward_hook(keep)")
            self.add(last, cls, second, inplace, child)
            words.extend(["in a child"] if child else [])
            if kept == "view":
                lines.append("h = h + 0.3 * view.mean(1, keepdim=True)")
            elif kept == "feature after":
                lines.append("self.feature = h")
            if kept:
                words.append(f"kept: {kept}")
                cls.truth = max(cls.truth, REFUSE if aliased and inplace == "True" else EDIT)

        if kind in ("basic", "bottleneck", "inner"):
            lines.append(f"h = {middle('self.norm1(self.conv1(x))')}")
            if kind == "bottleneck":
                cls.init.append(f"self.conv3, self.norm3 = conv({mid}, {mid}, 1), norm({mid})")
                lines.append(f"h = {middle('self.norm3(self.conv3(h))')}")
            parts(early, mid)
            lines.append("h = self.norm2(self.conv2(h))")
        else:
            lines.append(f"h = {middle('self.norm1(x)')}")
            lines.append("h = self.conv1(h)")
            parts(early, mid)
            lines.append("h = self.norm2(h)")
        if kind in ("pre-activation", "inner"):
            last_relu(fresh=False)
            if kind == "pre-activation":
                lines.append("h = self.conv2(h)")
            if after and self.likely(0.5):
                parts(after, "outputs")
                after = []
        if late:
            lines.append("s = self.shortcut(x)")
            cls.truth = max(cls.truth, MAY if "computed late" in words else EDIT)
        lines += add.splitlines()
        if kind in ("basic", "bottleneck"):
            last_relu(fresh=add != "h += s")
        parts(after, "outputs")
        if self.likely(0.1):
            cls.init.append("nn.init.zeros_(self.norm2.weight)")
            words.append("zero-initialized norm")
        lines.append("return h")
        self.classes.append(
            cls.text(inplace, "inputs, outputs, stride, label", "x")
            .replace("INPLACE", inplace)
            .replace("super().__init__()", "super().__init__()\n        self.label = label", 1)
        )
        self.made[cls.name] = cls.truth, words
        return cls.name

    def network(self, seed: int) -> Written:
        """Write the classes of blocks, and the network that holds them."""
        rng = self.rng
        names = [self.block() for _ in range(rng.choice([1, 1, 2, 3]))]
        stages = rng.choice([1, 2, 2, 3])
        blocks, init, run, width = list[Block](), list[str](), list[str](), 4
        all_in_attributes = self.likely(0.1)
        for g in range(1, stages + 1):
            form = "attributes beside others" if all_in_attributes else rng.choice([*STAGES])
            outputs, made = width * rng.choice([1, 2]) if g > 1 else width, []
            stage_class = rng.choice(names)
            for b in range(1, rng.choice([1, 2, 2, 3]) + 1):
                name = stage_class if self.likely(0.7) else rng.choice(names)
                label, truth = f"G{g}.B{b}", self.made[name]
                stride = 2 if b == 1 < g and form != "after a convolution" else 1
                inputs = outputs if b > 1 or form == "after a convolution" else width
                unit = rng.choice([*UNITS]) if self.likely(0.25) else "BLOCK"
                made.append(
                    unit.replace("BLOCK", f'{name}({inputs}, {outputs}, {stride}, "{label}")').replace(
                        "C)", f"{outputs})"
                    )
                )
                words = [
                    *truth[1],
                    *([unit] if unit != "BLOCK" else []),
                    *([form] if form != "Sequential" else []),
                ]
                blocks.append(Block(label, truth[0], tuple(words)))
            maker, runner = STAGES[form]
            if "reversed" in runner:
                made.reverse()
            listed = ", ".join(made)
            init.append(
                f"self.layer{g} = "
                + maker.format(
                    blocks=listed,
                    inputs=width,
                    outputs=outputs,
                    keyed=", ".join(f"k{i}={m}" for i, m in enumerate(made)),
                )
            )
            run += [*runner.format(g=g).splitlines(), "maps.append(x)"]
            width = outputs
        if self.likely(0.3):
            init.reverse()  # registered in another order than run
        stem = rng.choice(["nn.ReLU()", "nn.ReLU(True)", "nn.Identity()"])
        net = _Class("Net", init)
        head = self.spelled("RELU(mean(x).flatten(1))", net) if self.likely(0.3) else "mean(x).flatten(1)"
        answer = rng.choice(
            ["y", "y", "y", "y, maps[0]", "[y, *maps]", '{"y": y, "maps": maps}', "Answer(y, maps)"]
        )
        lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        self.stem = nn.Sequential(conv(3, 4), norm(4), {stem})"]
        lines += [" " * 8 + i for i in [*init, f"self.head = nn.Linear({width}, 5)"]]
        lines += ["    def forward(self, x):", "        x, maps = self.stem(x), []"]
        lines += [" " * 8 + i for i in [*run, f"y = self.head({head})", f"return {answer}"]]
        prelude = PRELUDE.replace("2d", f"{self.dimensions}d")
        text = "\n\n\n".join([prelude, *self.classes, "\n".join(lines)]) + "\n"
        twin = text.replace(prelude, prelude + SPOT)
        return Written(seed, _read(text, False), _read(twin, True), blocks, self.dimensions)


def write(seed: int) -> Written:
    """The network of this seed."""
    return _Writer(seed).network(seed)
