"""Two-shot sums, differences and products (Stolfo et al., 2023, arXiv:2305.15054)."""

from __future__ import annotations

import operator
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, product, zip_longest
from typing import TYPE_CHECKING

from patchsweep.errors import BadInput
from patchsweep.pairs import Bos, Pair
from patchsweep.tasks.task import following, in_random_order, lay, spaced_apart, task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST = 300  # operands and results are 1 ... 300, as in the paper
# Operation -> what it does, its sign, its word.
OPERATIONS: dict[str, tuple[Callable[[int, int], int], str, str]] = {
    "addition": (operator.add, "+", "plus"),
    "subtraction": (operator.sub, "-", "minus"),
    "multiplication": (operator.mul, "*", "times"),
}
# Two that are solved and one to solve.
TEMPLATES = (
    "{a} {sign} {b} = {c}; {d} {sign} {e} = {f}; {A} {sign} {B} =",
    "{a} {word} {b} is {c}. {d} {word} {e} is {f}. {A} {word} {B} is",
)
CANDIDATES = 300  # problems that are tried as the corrupt one

Problem = tuple[int, int, int]  # a, b and a ∘ b


@task(corruption=("operands", "first", "second"), operation=("all", *OPERATIONS))
def arithmetic(
    tokenizer: PreTrainedTokenizerBase, seed: int, bos: Bos, *, corruption: str, operation: str
) -> Iterator[Pair]:
    """Clean "3 + 8 = 11; 20 + 5 = 25; 7 + 12 =" is answered by 19; wrong is the result of the
    corrupt prompt, which has another last problem of as many tokens.

    corruption: operands (both are others), first or second (only that one). operation: addition,
    subtraction, multiplication, or all, which take turns. Operands and results are 1 to 300,
    results one token: where digits are tokens of their own 1 to 9, as the paper has it for such
    models. A problem is asked at most once per template. Labels A, B (of digits A_1, A_2 ...), END;
    group: operation and template, e.g. "addition-0".
    """
    gap = " " if spaced_apart(tokenizer) else ""
    results = {
        c: token[0]
        for c in range(1, LARGEST + 1)
        if len(token := following(tokenizer, f"3 ={gap}", f"{c}" if gap else f" {c}")) == 1
    }
    if not results:
        raise BadInput(
            "task 'arithmetic': no number up to 300 is one token of this tokenizer: "
            "write the pairs to a file instead"
        )
    widths = {n: len(following(tokenizer, "3 +", f" {n}")) for n in range(1, LARGEST + 1)}
    rng = random.Random(seed)
    queues = []
    for name in OPERATIONS if operation == "all" else (operation,):
        apply = OPERATIONS[name][0]
        pairs = product(range(1, LARGEST + 1), repeat=2)
        problems = [(a, b, c) for a, b in pairs if (c := apply(a, b)) in results]
        queues += [
            _asked(rng, name, i, problems, widths, corruption) for i in range(len(TEMPLATES))
        ]
    for turn in zip_longest(*queues):
        for group, template, words, problem, other in filter(None, turn):
            clean, corrupt = (
                lay(tokenizer, template + gap, words | {"A": f"{a}", "B": f"{b}"}, bos)
                for a, b, _ in (problem, other)
            )
            if clean and corrupt and clean.fits(corrupt):
                answer, wrong = (results[problem[2]],), (results[other[2]],)
                yield Pair(clean.ids, corrupt.ids, answer, wrong, clean.labels, group)


def _asked(
    rng: random.Random,
    operation: str,
    template: int,
    problems: Sequence[Problem],
    widths: Mapping[int, int],
    corruption: str,
) -> Iterator[tuple[str, str, dict[str, str], Problem, Problem]]:
    """Group, template, its words but for the last problem, that one, and the corrupt one."""
    _, sign, word = OPERATIONS[operation]
    kept = {"operands": (), "first": (1,), "second": (0,)}[corruption]
    by_kept: dict[tuple[int, ...], list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kept[tuple(problem[i] for i in kept)].append(problem)
    for problem in in_random_order(rng, problems):
        others = by_kept[tuple(problem[i] for i in kept)]
        fitting = (
            other
            for other in islice(in_random_order(rng, others), CANDIDATES)
            if all((problem[i] == other[i]) == (i in kept) for i in range(3))
            and all(widths[problem[i]] == widths[other[i]] for i in range(2))
        )
        other = next(fitting, None)
        shots = islice(in_random_order(rng, problems), 4)
        solved = [number for shot in shots if shot not in (problem, other) for number in shot][:6]
        if other and len(solved) == 6:
            words = dict(zip("abcdef", map(str, solved), strict=True))
            words |= {"sign": sign, "word": word}
            yield f"{operation}-{template}", TEMPLATES[template], words, problem, other
