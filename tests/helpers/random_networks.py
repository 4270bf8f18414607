"""Writes random networks of which it is known, by the way they are written, what the surgery must do.

`write(seed)` gives two source texts: a network, and its twin, in which a person has put `self.spot` at the
last ReLU of each block.
"""

import random
import re
from dataclasses import dataclass
from typing import NamedTuple

from tests.helpers.random_calls import CALLS, EDIT, LASTS, MAY, REFUSE, Part
from tests.helpers.random_classes import HEADER, Class, read
from tests.helpers.random_parts import PARTS, STAGES, UNITS

ADDITIONS = ("h = h + s", "h += s", "h = torch.add(h, s)", "h = s + h", "s += h\nh = s")
RELU_IN_SHORTCUT = "nn.Sequential(conv(inputs, outputs, 1, stride), nn.ReLU(), conv(outputs, outputs, 1))"
PLAIN_SHORTCUT = "nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))"


class Block(NamedTuple):
    """What is true of a block of the network."""

    label: str
    truth: int
    parts: tuple[str, ...]  # what is in it, in words


@dataclass
class Written:
    """A network, its twin and the truth."""

    seed: int
    text: str
    twin: str
    blocks: list[Block]
    dimensions: int


class _Writer:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.classes: list[str] = []
        self.made: dict[str, Class] = {}  # the classes of blocks
        self.count = 0

    def likely(self, chance: float) -> bool:
        return self.rng.random() < chance

    def name(self, what: str) -> str:
        self.count += 1
        return f"{what}{self.count}"

    def relu(self, argument: str, to: Class, last: bool = False, unseen: bool = False) -> str:
        """A call of ReLU in any spelling; a last one is marked."""
        calls = [
            c for c in CALLS if last or not ("in place" in c.options or ("INPLACE" in c.init and to.inplace))
        ]
        call = self.rng.choice([c for c in calls if not unseen or "limit" not in c.options])
        to.init += call.init.splitlines()
        to.methods += [call.methods] if call.methods else []
        text = call.lines.replace("{}", argument)
        if not last:
            return text
        to.truth = max(to.truth, call.truth)
        to.words.append(call.name)
        to.spot |= "in place" in call.options or ("INPLACE" in call.init and to.inplace)
        return f"«{text}|{argument}»"

    def spelled(self, text: str, to: Class, unseen: bool = False) -> str:
        """The text with a call of ReLU for each RELU(...) and LAST(...)."""
        while match := re.search(r"\b(RELU|LAST)\(", text):
            depth, end = 1, match.end()
            while depth:
                depth += (text[end] == "(") - (text[end] == ")")
                end += 1
            called = self.relu(text[match.end() : end - 1], to, match[1] == "LAST", unseen)
            text = text[: match.start()] + called + text[end:]
        return text

    def add(self, part: Part, to: Class, channels: str, child: bool = False) -> None:
        """Put a part into a class, or into a child module of its own."""
        target = Class(self.name("Part"), ", C", to.inplace, to.spot) if child else to
        if "«" in part.init + part.lines:
            target.spot |= "in place" in part.options or ("INPLACE" in part.init and to.inplace)
        marked = part.init.replace("|»", "|!Spot(SPOT)»")
        target.init += (marked if child else re.sub(r"\bC(?=[,)])", channels, marked)).splitlines()
        target.lines += self.spelled(part.lines, target, unseen=part.truth == REFUSE).splitlines()
        to.truth = max(to.truth, part.truth)
        if child:
            target.lines.append("return h")
            self.classes.append(target.text())
            attribute = target.name.lower()
            to.init.append(f"self.{attribute} = {target.name}({channels})")
            to.lines.append(f"h = self.{attribute}(h)")
            to.truth, to.spot = max(to.truth, target.truth), target.spot
            to.words += [*target.words, "in a child"]

    def last(self, to: Class, channels: str, fresh: bool) -> None:
        """The last ReLU of a block; something may keep what goes into it."""
        part = self.rng.choice(LASTS) if self.likely(0.5) else LASTS[0]
        kept = self.rng.choice(["feature", "view", "hook", "after"]) if self.likely(0.15) else ""
        before = {"feature": "self.feature = h", "view": "view = h[:, 1:]"}
        to.lines += [before[kept]] if kept in before else []
        if kept == "hook":
            to.init.append("self.norm2.register_forward_hook(keep)")
        to.words.append(part.name)
        self.add(part, to, channels, child=self.likely(0.2))
        after = {"view": "h = h + 0.3 * view.mean(1, keepdim=True)", "after": "self.feature = h"}
        to.lines += [after[kept]] if kept in after else []
        if kept:
            to.words.append(f"kept: {kept}" + (", in place" if to.spot else ""))
            shared = (
                to.spot and "fresh" not in part.options and (kept in before or (kept == "hook" and not fresh))
            )
            to.truth = max(to.truth, MAY if shared else EDIT)

    def parts(self, several: list[Part], to: Class, channels: str, harmless: bool = False) -> None:
        """Put parts between the calls; before the last ReLU another one does no harm."""
        for part in several:
            if part.name not in to.words:
                truth = to.truth
                to.words.append(part.name)
                self.add(part, to, channels, child="fixed" not in part.options and self.likely(0.5))
                to.truth = truth if harmless else to.truth

    def block(self) -> str:
        """Write a class of blocks; its name."""
        rng = self.rng
        kind = rng.choice(["basic", "basic", "bottleneck", "pre-activation", "inner"])
        cls = Class(self.name("Block"), ", inputs, outputs, stride, label", self.likely(0.4), words=[kind])
        early_norm, post = kind == "pre-activation", kind in ("basic", "bottleneck")
        mid = rng.choice(["outputs", "outputs", "2 * outputs"])
        normed = ("inputs", mid) if early_norm else (mid, "outputs")
        gated_shortcut, late = self.likely(0.2), self.likely(0.4)
        cls.words += ["shortcut with ReLU"] if gated_shortcut else []
        cls.init += [
            "self.label = label",
            f"self.conv1, self.conv2 = conv(inputs, {mid}, 3, stride), conv({mid}, outputs)",
            f"self.norm1, self.norm2 = norm({normed[0]}), norm({normed[1]})",
            "self.shortcut = nn.Sequential()",
            "if stride > 1 or inputs != outputs:",
            f"    self.shortcut = {RELU_IN_SHORTCUT if gated_shortcut else PLAIN_SHORTCUT}",
        ]
        cls.lines += ["x = h", *([] if late else ["s = self.shortcut(x)"])]
        if self.likely(0.1):
            cls.lines += ["if self.training and random.random() < 0.3:", "    return self.shortcut(x)"]
            cls.words.append("leaves early")
        if gated_shortcut and ("leaves early" in cls.words or (late and not post)):
            cls.words.append("shortcut last")
            cls.truth = MAY
        chosen = [rng.choice(PARTS) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
        early = [p for p in chosen if "after" not in p.options and self.likely(0.4)]
        after = [p for p in chosen if p not in early]
        add = rng.choice(ADDITIONS)
        first = "RELU(self.norm1(h))" if early_norm else "RELU(self.norm1(self.conv1(h)))"
        cls.lines.append("h = " + self.spelled(first, cls))
        cls.lines += ["h = self.conv1(h)"] if early_norm else []
        if kind == "bottleneck":
            cls.init.append(f"self.conv3, self.norm3 = conv({mid}, {mid}, 1), norm({mid})")
            cls.lines.append("h = " + self.spelled("RELU(self.norm3(self.conv3(h)))", cls))
        self.parts(early, cls, mid, harmless=True)
        cls.lines.append("h = self.norm2(h)" if early_norm else "h = self.norm2(self.conv2(h))")
        if not post:
            self.last(cls, normed[1], fresh=False)
            cls.lines += ["h = self.conv2(h)"] if early_norm else []
        cls.lines += [*(["s = self.shortcut(x)"] if late else []), add]
        if post:
            self.last(cls, "outputs", fresh=add != "h += s")
        self.parts(after, cls, "outputs")
        if self.likely(0.1):
            cls.init.append("nn.init.zeros_(self.norm2.weight)")
            cls.words.append("zero-initialized norm")
        cls.lines.append("return h")
        self.classes.append(cls.text())
        self.made[cls.name] = cls
        return cls.name

    def stage(
        self, g: int, form: str, names: list[str], inputs: int, outputs: int, units: list[str]
    ) -> tuple[str, list[Block]]:
        """The expression that makes the blocks of a stage, and the truth of each."""
        made, blocks, common = [], list[Block](), self.rng.choice(names)
        for b in range(1, self.rng.choice([1, 2, 2, 3]) + 1):
            name = common if self.likely(0.7) else self.rng.choice(names)
            label, cls = f"G{g}.B{b}", self.made[name]
            begins = b == 1 and form != "convolution"
            size = f"{inputs if begins else outputs}, {outputs}, {2 if begins and g > 1 else 1}"
            unit = self.rng.choice(units) if self.likely(0.2) else "BLOCK"
            text = re.sub(r"\bC(?=[,)])", str(outputs), unit)
            made.append(text.replace("BLOCK", f'{name}({size}, "{label}")'))
            more = ([unit] if unit != "BLOCK" else []) + ([form] if form != "Sequential" else [])
            blocks.append(Block(label, cls.truth, (*cls.words, *more)))
        made = made[::-1] if form == "reversed" else made
        keyed = ", ".join(f"k{i}={m}" for i, m in enumerate(made))
        return STAGES[form][0].format(blocks=", ".join(made), keyed=keyed, i=inputs, o=outputs), blocks

    def network(self, seed: int) -> Written:
        """Write the classes of blocks, and the network that holds them."""
        rng, net = self.rng, Class("Net", "", False)
        dimensions = rng.choice([2, 2, 2, 2, 2, 1, 3])
        names = [self.block() for _ in range(rng.choice([1, 1, 2]))]
        blocks, width, trees = list[Block](), 4, self.likely(0.1)
        stem = rng.choice(["nn.ReLU()", "nn.ReLU(True)", "nn.Identity()"])
        net.lines += ["x, maps = self.stem(h), []"]
        stages = rng.choice([1, 2, 2, 3])
        # the only blocks, each with something beside it, may be stages: that is left open
        units = [u for u in UNITS if stages > 1 or "conv" not in u]
        for g in range(1, stages + 1):
            form = "tree" if trees else rng.choice([f for f in STAGES if f != "tree"])
            outputs = width * rng.choice([1, 2]) if g > 1 else width
            made, more = self.stage(g, form, names, width, outputs, units)
            net.init.append(f"self.layer{g} = {made}")
            net.lines += [*STAGES[form][1].format(g=g).splitlines(), "maps.append(x)"]
            blocks, width = blocks + more, outputs
        if self.likely(0.3):
            net.init.reverse()  # registered in another order than they run
        net.init += [
            f"self.stem = nn.Sequential(conv(3, 4), norm(4), {stem})",
            f"self.head = nn.Linear({width}, 5)",
        ]
        pooled = "mean(x).flatten(1)"
        net.lines.append(
            f"y = self.head({self.spelled(f'RELU({pooled})', net) if self.likely(0.3) else pooled})"
        )
        answer = rng.choice(
            ["y", "y", "y", "y, maps[0]", "[y, *maps]", '{"y": y, "maps": maps}', "Answer(y, maps)"]
        )
        net.lines.append(f"return {answer}")
        header = HEADER.replace("2d", f"{dimensions}d")
        text = "\n\n\n".join([header.strip(), *self.classes, net.text()]) + "\n"
        return Written(seed, read(text, False), read(text, True), blocks, dimensions)


def write(seed: int) -> Written:
    """The network of this seed."""
    return _Writer(seed).network(seed)
