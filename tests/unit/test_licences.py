"""The page of licences names all direct dependencies, with the licences that they state."""

from release import licences


def test_the_page_is_current_for_direct_dependencies():
    page = licences.PAGE.read_text(encoding="utf-8")
    for extra, requirements in licences.direct().items():
        title = f"## Extra `{extra}`" if extra else "## Always"
        part = page.split(f"{title}\n")[1].split("\n## ")[0]
        names = [line.split(" | ")[0].removeprefix("| ") for line in part.splitlines() if line.startswith("| ")][1:]
        wanted = list(dict.fromkeys(one.name for one in requirements))
        assert names == wanted, "run `python release/licences.py`"
        for line in licences.rows(wanted):
            assert line in part, "run `python release/licences.py`"
