"""The goal of lora's speed: in no case of a benchmark is a peer's median below lora's, but in those that are named.

The results are read as they are published, in benchmarks/results/*.md, and benchmarks/README.md must name the cases
that miss the goal: those, and no others.
"""

import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = ("loralib", "PEFT")
# What a peer's variant is compared with, where the same words after the library's name do not say it.
COUNTERPARTS = {
    ("conv", "loralib"): "lora, as loralib",
    ("conv", "PEFT"): "lora, factored",
    ("decode", "loralib, eval"): "lora, eval with its cache",
    ("bank", "PEFT, adapter_names"): "lora, bank",
    ("bank", "PEFT, set_adapter"): "lora, bank",
    ("dora", "PEFT: W₀ + s · B A built"): "lora",
}
HEADING = "### Where a peer is ahead"


def cases(text):
    """(case, {variant: ratio}) for each table of ratios in the Markdown of a topic's results."""
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        name, _, body = section.partition("\n")
        lines = [
            [cell.strip() for cell in line.strip("| ").split(" | ")] for line in body.splitlines() if line[:1] == "|"
        ]
        if lines and lines[0][0] == "variant" and "ratio" in lines[0]:
            column = lines[0].index("ratio")
            yield name.strip(), {line[0]: float(line[column]) for line in lines[2:]}


def compared(topic, ratios):
    """(peer's variant, lora's, whether lora's median is at most the peer's) for each peer's variant of a case."""
    for peer in ratios:
        library = re.match(r"[^,:]*", peer)[0]
        if library in PEERS:
            ours = COUNTERPARTS.get((topic, peer), "lora" + peer.removeprefix(library))
            yield peer, ours, ratios[ours] <= ratios[peer]


def misses(results):
    """The cases in which a peer is ahead, as lines of the README."""
    found = []
    for topic, text in results.items():
        for case, ratios in cases(text):
            for peer, ours, reached in compared(topic, ratios):
                if not reached:
                    found.append(f"{topic}: {case}: {ours} {ratios[ours]:.3f}, {peer} {ratios[peer]:.3f}")
    return found


def named(readme):
    """The cases that the README names as those that miss the goal."""
    _, _, below = readme.partition(f"{HEADING}\n")
    block = re.match(r"(?:(?!^#).*\n)*", below, flags=re.MULTILINE)[0]
    return re.findall(r"^- (\w+: .*)$", block, flags=re.MULTILINE)


def published():
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((BENCHMARKS / "results").glob("*.md"))}


def test_the_cases_in_which_a_peer_is_ahead_are_those_that_the_readme_names():
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert HEADING in readme
    assert sorted(named(readme)) == sorted(misses(published()))


def test_every_variant_of_a_peer_is_compared():
    """As many as there are lines that begin with a peer's name in results that have ratios. (Curves have none.)"""
    results, count = published(), 0
    for topic, text in results.items():
        for _, ratios in cases(text):
            peers = [variant for variant in ratios if variant.startswith(PEERS)]
            assert [peer for peer, _, _ in compared(topic, ratios)] == peers
            count += len(peers)
    timed = [text for text in results.values() if "| ratio |" in text]
    lines = [line for text in timed for line in text.splitlines() if line.startswith(("| loralib", "| PEFT"))]
    assert count == len(lines) > 80


TABLE = """# conv

## narrow, float32

| variant | ms | ratio | rounds |
| --- | --- | --- | --- |
| frozen | 1.0 | 1.000 | 5 |
| loralib | 1.5 | 1.500 | 5 |
| PEFT | 1.7 | 1.700 | 5 |
| lora, as loralib | 1.5 | {as_loralib} | 5 |
| lora, factored | 1.5 | {factored} | 5 |

## Measured on

- date: today
"""


@pytest.mark.parametrize(
    ("as_loralib", "factored", "expected"),
    [
        ("1.500", "1.700", []),
        ("1.501", "1.600", ["conv: narrow, float32: lora, as loralib 1.501, loralib 1.500"]),
        ("1.400", "1.701", ["conv: narrow, float32: lora, factored 1.701, PEFT 1.700"]),
    ],
)
def test_a_miss_is_found_by_its_median_and_said_with_both(as_loralib, factored, expected):
    found = misses({"conv": TABLE.format(as_loralib=as_loralib, factored=factored)})
    assert found == expected
    readme = f"# Benchmarks\n\n- conv: not here\n\n{HEADING}\n\nThese:\n\n" + "".join(f"- {line}\n" for line in found)
    assert named(readme + "\n## Next\n\n- conv: nor here\n") == expected
