"""The benchmarks of the Kimi K2.5 report, and the rules for files of one's own, by name.

References are what the report says of Kimi K2.5 (arXiv 2602.02276, table 4). They are documentation: nothing here was
measured with k25sys, whose models are not that model. Protocol: appendix E of the report, spec section 9.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from k25sys.errors import ArgumentValueError, message
from k25sys.evaluation import rules
from k25sys.evaluation.rules import Rule

REPORT = "Kimi K2.5 report, arXiv 2602.02276, table 4"
_REASONING_TOKENS = 98_304
_MEDIA_TOKENS = 65_536
_JUDGE = "a language model as judge of its free-form answers"
_TOOLS_AND_JUDGE = f"search and browsing tools, and {_JUDGE}"
_REPOSITORY = "an agent with tools in a container of each repository, and its tests"
_SANDBOX = "a sandbox that runs the programs it asks for against hidden tests"

_VALUES = (
    "no computer algebra: +-*/^, fractions, roots, pi, ln, n! (n <= 500) and binomials (n <= 4000) have values, and of "
    "an equation the right side counts; all else (variables, e, i, log, trigonometry, |x|, floors, sums, \\pm, unions, "
    "repeating decimals, \\choose)"
)
_NO_VALUE, _AS_LATEX = f"{_VALUES} has none, and is wrong", f"{_VALUES} must agree as LaTeX"
_OPEN_DIFFERS = (
    "open answers by the benchmark's rule, but of a reply that states its answer (a box, 'answer is', 'answer:') that "
    "alone is read, and an equal value in another form is right; a letter counts where it is stated, a line of its own "
    "or the only one in brackets, where the benchmark"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark: how questions are put and answers scored."""

    name: str
    title: str
    group: str
    rule: Rule | None = None
    """None where rules alone cannot score it."""
    num_samples: int = 1
    """k of avg@k; 1 where the report gives none."""
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = _REASONING_TOKENS
    mode: Literal["thinking", "instant"] = "thinking"
    frames: int | None = None
    """Frames of a video, evenly spread over it; None: two a second, as the model was released."""
    frame_side: int = 896
    """The most pixels along a side of such a frame."""
    pair_field: str = ""
    """A field of the rows; rows with one value of it are right together or not at all."""
    reference: float | None = None
    """Kimi K2.5's score, in percent, as the report has it."""
    source: str = REPORT
    needs: str = ""
    """What a run needs beyond a model and a file; such a task is listed and refused."""
    remark: str = ""
    """Where scoring here differs from the benchmark's own."""

    def __post_init__(self) -> None:
        least = {"num_samples": 1, "max_tokens": 1, "temperature": 0, "frame_side": 28}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in least and not (math.isfinite(value) and value >= least[field.name]):
                raise ArgumentValueError(message("Task", field.name, value, f"a number >= {least[field.name]}"))

    def scoring(self) -> Rule:
        """Its rule.

        Raises:
            ValueError: the task needs more than rules.
        """
        if self.rule is None or self.needs:
            accepted = "a task that rules alone can score (eval --list)"
            hint = f"{self.title} needs {self.needs}, and a score without would be another benchmark's"
            raise ArgumentValueError(message("Task.scoring", "task", repr(self.name), accepted, hint))
        return self.rule


def find_task(name: str) -> Task:
    """The task called `name`. Raises ValueError for an unknown one."""
    by_name = {task.name: task for task in tasks()}
    if name not in by_name:
        near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.5)
        accepted = f"a name of eval --list{', such as ' + ', '.join(near) if near else ''}"
        raise ArgumentValueError(message("find_task", "task", repr(name), accepted))
    return by_name[name]


def tasks() -> tuple[Task, ...]:
    """All tasks, in the order of the report's table; those without a reference last."""
    return (*_reasoning(), *_coding(), *_agentic(), *_image(), *_video(), *_computer_use(), *_own())


def _refused(
    group: str,
    needs: str,
    entries: Iterable[tuple[str, str, float]],
    num_samples: int = 1,
    *,
    mode: Literal["thinking", "instant"] = "thinking",
    temperature: float = 1.0,
) -> list[Task]:
    return [
        Task(
            name=name, title=title, group=group, reference=reference, needs=needs, num_samples=num_samples,
            mode=mode, temperature=temperature,
        )
        for name, title, reference in entries
    ]  # fmt: skip


def _reasoning() -> list[Task]:
    group = "reasoning"
    multiple_choice = [
        Task(name=name, title=title, group=group, rule=rules.CHOICE, num_samples=k, reference=reference)
        for name, title, k, reference in (
            ("gpqa-diamond", "GPQA-Diamond", 8, 87.6),
            ("mmlu-pro", "MMLU-Pro", 1, 87.1),
            ("longbench-v2", "LongBench v2", 1, 61.0),
        )
    ]
    return [
        Task(
            name="aime-2025", title="AIME 2025", group=group, rule=rules.NUMBER, num_samples=64,
            reference=96.1, remark=_NO_VALUE,
        ),
        Task(
            name="hmmt-2025", title="HMMT 2025 (February)", group=group, rule=rules.MATH, num_samples=64,
            reference=95.4, remark=_AS_LATEX,
        ),
        *multiple_choice,
        *_refused(group, _JUDGE, (
            ("hle", "Humanity's Last Exam", 30.1), ("imo-answerbench", "IMO-AnswerBench", 81.8),
            ("simpleqa-verified", "SimpleQA Verified", 36.9), ("advancedif", "AdvancedIF", 75.6),
        )),
        *_refused(group, _TOOLS_AND_JUDGE, [("hle-tools", "Humanity's Last Exam, with tools", 50.2)]),
    ]  # fmt: skip


def _coding() -> list[Task]:
    terminal = "an agent with a terminal in a container of each task"
    return [
        *_refused("coding", _REPOSITORY, (
            ("swe-bench-verified", "SWE-bench Verified", 76.8), ("swe-bench-pro", "SWE-bench Pro", 50.7),
            ("swe-bench-multilingual", "SWE-bench Multilingual", 73.0),
        ), 5, mode="instant"),
        *_refused("coding", terminal, (
            ("terminal-bench-2", "Terminal-Bench 2.0", 50.8),
        ), 5, mode="instant"),
        *_refused("coding", terminal, [("cybergym", "CyberGym", 41.3)], 5),
        *_refused("coding", "an agent that writes and runs code, and a judge with rubrics", (
            ("paperbench", "PaperBench", 63.5),
        ), 5),
        *_refused("coding", _SANDBOX, (
            ("scicode", "SciCode", 48.7), ("ojbench", "OJBench", 57.4), ("livecodebench-v6", "LiveCodeBench v6", 85.0),
        ), 5),
    ]  # fmt: skip


def _agentic() -> list[Task]:
    swarm = f"a swarm of agents with {_TOOLS_AND_JUDGE}"
    return [
        *_refused("agentic", _TOOLS_AND_JUDGE, (
            ("browsecomp", "BrowseComp", 60.6), ("browsecomp-managed", "BrowseComp, with context management", 74.9),
            ("deepsearchqa", "DeepSearchQA", 77.1), ("finsearchcomp", "FinSearchComp T2&T3", 67.8),
        )),
        *_refused("agentic", _TOOLS_AND_JUDGE, (("widesearch", "WideSearch", 72.7), ("seal-0", "Seal-0", 57.4)), 4),
        *_refused("agentic", swarm, [("browsecomp-swarm", "BrowseComp, Agent Swarm", 78.4)]),
        *_refused("agentic", swarm, [("widesearch-swarm", "WideSearch, Agent Swarm", 79.0)], 4),
        *_refused("agentic", "an agent with office tools, and pairwise judges", [("gdpval-aa", "GDPVal-AA", 41.0)]),
    ]  # fmt: skip


def _image() -> list[Task]:
    def image(name: str, title: str, rule: Rule, reference: float, remark: str = "", pair_field: str = "") -> Task:
        return Task(
            name=name, title=title, group="image", rule=rule, num_samples=3, max_tokens=_MEDIA_TOKENS,
            reference=reference, remark=remark, pair_field=pair_field,
        )  # fmt: skip

    by_rule = "answers are read out of replies by rule, not by a language model"
    return [
        image("mmmu-pro", "MMMU-Pro", rules.CHOICE, 78.5),
        image(
            "mmmu", "MMMU", rules.MMMU, 84.3,
            f"{_OPEN_DIFFERS} takes the last between spaces, else an option's text, else draws one at random",
        ),
        image("mathvision", "MathVision", rules.OPEN, 84.2, _AS_LATEX),
        image("mathvista", "MathVista", rules.OPEN, 90.1, by_rule),
        image("zerobench", "ZeroBench", rules.BRACES, 9.0),
        image("blink", "BLINK", rules.CHOICE, 78.9),
        image("mmvp", "MMVP", rules.CHOICE, 87.0, 'both questions of a "pair" must be right', "pair"),
        image(
            "omnidocbench", "OmniDocBench", rules.EDIT, 88.8,
            "one text a page; the benchmark's own script averages over text, formulas, tables and reading order",
        ),
        image("ocrbench", "OCRBench", rules.CONTAINED, 92.3),
        image("infovqa", "InfoVQA", rules.ANLS, 92.6),
        *_refused("image", _JUDGE, (
            ("charxiv", "CharXiv (reasoning)", 77.5), ("simplevqa", "SimpleVQA", 71.2), ("worldvqa", "WorldVQA", 46.3),
            ("babyvision", "BabyVision", 36.5),
        ), 3),
        *_refused("image", "image tools over up to 30 steps", [("zerobench-tools", "ZeroBench, with tools", 11.0)], 3),
    ]  # fmt: skip


def _video() -> list[Task]:
    def video(name: str, title: str, rule: Rule, reference: float, *, is_long: bool, remark: str = "") -> Task:
        return Task(
            name=name, title=title, group="video", rule=rule, num_samples=3, max_tokens=_MEDIA_TOKENS,
            reference=reference, frames=2048 if is_long else 128, frame_side=448 if is_long else 896, remark=remark,
        )  # fmt: skip

    return [
        video(
            "videommmu", "VideoMMMU", rules.VIDEO_MMMU, 86.6, is_long=False,
            remark=f"{_OPEN_DIFFERS} takes the last before a sign or a space, else an option's text; an empty reply is "
            "wrong, where the benchmark leaves it out",
        ),
        video("motionbench", "MotionBench", rules.CHOICE, 70.4, is_long=False),
        video("video-mme", "Video-MME", rules.CHOICE, 87.4, is_long=True),
        video("longvideobench", "LongVideoBench", rules.CHOICE, 79.8, is_long=True),
        video("lvbench", "LVBench", rules.CHOICE, 75.9, is_long=True),
        *_refused("video", f"{_JUDGE} (a part of its questions)", [("mmvu", "MMVU", 80.4)], 3),
    ]  # fmt: skip


def _computer_use() -> list[Task]:
    needs = "a computer to operate: screenshots, a pointer and a keyboard over up to 100 steps"
    return [
        *_refused("computer use", needs, [("osworld-verified", "OSWorld-Verified", 63.3)], temperature=0.0),
        *_refused("computer use", needs, [("webarena", "WebArena", 58.9)], temperature=0.1),
    ]


def _own() -> list[Task]:
    """Rules for files of one's own: greedy, without thinking."""
    entries = (
        ("choice", "multiple choice", rules.CHOICE), ("number", "numbers", rules.NUMBER),
        ("math", "mathematics", rules.MATH), ("exact", "short answers", rules.EXACT),
        ("ocr", "transcriptions", rules.EDIT), ("document-questions", "questions on documents", rules.ANLS),
        ("chart", "chart values (ChartQA)", rules.CHART), ("boxes", "boxes", rules.BOXES),
        ("table-items", "tables by item", rules.TABLE_ITEMS), ("table-rows", "tables by row", rules.TABLE_ROWS),
    )  # fmt: skip
    return [
        Task(name=name, title=title, group="own files", rule=rule, temperature=0.0, top_p=1.0, max_tokens=1024,
             mode="instant", source="")
        for name, title, rule in entries
    ]  # fmt: skip
