"""Several ranks give what one rank gives, to the bit: `tests.on_ranks` by one, two and three processes."""

import json
from functools import cache

import pytest

from tests import on_ranks
from tests.ranks import started


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    """A function that gives the digests of cases, of all or the first, by a number of ranks."""

    @cache
    def made(which, count):
        out = tmp_path_factory.mktemp(f"ranks-{count}")
        if count == 1:
            on_ranks.main(out, which)
        else:
            started(count, "-m", "tests.on_ranks", str(out), which)
        return json.loads((out / on_ranks.DIGESTS).read_text())

    return made


@pytest.mark.parametrize(("which", "count"), [("first", 2), pytest.param("all", 3, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_weights(digests, which, count):
    one, several = digests(which, 1), digests(which, count)
    assert len(several) >= 8
    for case, digest in several.items():
        for part in ("zeros", "tensors", "losses", "distilling", "dropped"):
            assert digest[part] == one[case][part], f"{part} of {case}"
        assert digest["errors"] == pytest.approx(one[case]["errors"], rel=1e-5), case


def test_only_ranks_send(digests):
    assert not any(sent for digest in digests("first", 1).values() for sent in digest["sent"])
    assert all(sum(sent.values()) > 0 for digest in digests("first", 2).values() for sent in digest["sent"])
