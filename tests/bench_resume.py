"""Many kills: does a run that is killed again and again end with the bits of one that is not?

    python tests/bench_resume.py --kills 50            # some minutes; half of them with two processes

Each kill is a SIGKILL at a random moment, see test_resume.py; the runs are of a tiny model.
"""
import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

EACH = 5                               # kills of one run


def main() -> None:
    import yaml
    from test_resume import killed_and_resumed
    from test_train import RECIPE

    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("--kills", type=int, default=50)
    top.add_argument("--seed", type=int, default=0)
    given = top.parse_args()
    runs, equal = -(-given.kills // EACH), 0
    for i in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            place, ranks = Path(folder), 1 + i % 2
            (place / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
            good = killed_and_resumed(place, ranks, EACH, given.seed + i)
            equal += good
            print(f"run {i + 1} of {runs}, {ranks} process{'es' * (ranks > 1)}, {EACH} kills: "
                  f"{'the same bits' if good else 'OTHER BITS'}", flush=True)
    print(f"{equal} of {runs} runs, {runs * EACH} kills")
    sys.exit(equal != runs)


if __name__ == "__main__":
    main()
