"""Put measured tables into the README: `python -m experiments.readme` copies them between their markers.

A marker pair `<!-- results:NAME -->` … `<!-- /results -->` holds `experiments/results/NAME.md`, never typed by hand.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def with_results(text: str) -> str:
    """`text` with the present content of every marked result."""
    return MARKED.sub(
        lambda match: match[1] + (ROOT / f"experiments/results/{match[2]}.md").read_text(encoding="utf-8") + match[3],
        text,
    )


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_results(readme.read_text(encoding="utf-8")), encoding="utf-8")
