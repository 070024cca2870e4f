"""Comparisons behind the tables of the docs, as data: ``python -m tokenprune_eval.experiments NAME...``.

Each is one `tokenprune compare` on a testbed's held-out questions, or goes on with it where it was stopped; its
compare.csv is kept as ``eval/results/NAME.csv``. ``--show`` prints the command instead.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenprune.cli import app
from tokenprune.compare.arms import CONTROLS, UNIFORM
from tokenprune_testbed.evaluate import MAX_NEW_TOKENS

FORM = "source=hidden,normalization=trace"
#: Of a checkpoint that nothing was chosen on; eval/README.md says how it is trained.
UNSEEN = "build/unseen/model"
SERVED = "vflowopt,layer=0,size_term=false"  # what vLLM takes of it


@dataclass(frozen=True)
class Experiment:
    """A comparison.

    Attributes:
        model: "small", "smol", or a folder.
        questions: held-out ones.
        methods, budgets, controls: as on the command line.
        batch_size: prompts per batch.
        more: words of the command line.
    """

    model: str
    questions: int
    methods: Sequence[str]
    budgets: Sequence[str] = ("50%", "33%", "22%", "11%")
    controls: Sequence[str] = CONTROLS
    batch_size: int = 50
    more: Sequence[str] = ("--time-batch", "0")

    def command(self, out: Path) -> list[str]:
        """Arguments of `tokenprune`."""
        words = ["compare", self.model, "--data", "testbed", "--out", str(out), "--resume"]
        words += ["--questions", str(self.questions), "--max-new-tokens", str(MAX_NEW_TOKENS)]
        words += ["--batch-size", str(self.batch_size), *self.more]
        for name, values in (("budget", self.budgets), ("method", self.methods), ("control", self.controls)):
            words += [word for value in values for word in (f"--{name}", value)]
        return words


def forms(layer: int) -> list[str]:
    """Every form of EntropyPrune at a layer, and controls there."""
    sources, normalizations = ("query", "key", "value", "hidden"), ("none", "trace")
    own = [
        f"entropyprune,layer={layer},source={source},normalization={normalization}"
        for source in sources
        for normalization in normalizations
    ]
    return [*own, f"uniform,layer={layer}", f"random,layer={layer}"]


def every(at: str) -> list[str]:
    """Every method; `at` is added to those that read the decoder."""
    first = "vflowopt merge merge,of=divprune cdpruner divprune relevance visionzip prumerge tome restore,of=cdpruner"
    reading = [f"{name}{at}" for name in ("fastv", "question", "sparsevlm", "dart")]
    entropy = [f"entropyprune{at}", f"entropyprune{at},{FORM}"]
    seeds = [f"random,layer=0,seed={seed}" for seed in (1, 2)]
    return ["auto", *first.split(), *reading, "pyramiddrop", *entropy, *seeds]


def ahead(layer: int) -> list[str]:
    """What looking ahead costs, and what vLLM can be asked for besides."""
    own = [f"entropyprune,{k}={layer}{form}" for form in ("", f",{FORM}") for k in ("layer", "lookahead")]
    return [*own, SERVED, f"{SERVED},recycling=none"]


def parts(keep: float) -> list[str]:
    """VFlowOpt with one thing of it changed."""
    paper = "recycling=cells,even=0,a=3,size_term=false"  # no even grid
    changed = [paper, f"{paper},protect_recycled=true", "recycling=none,even=0,a=3,size_term=false"]
    changed += (
        "recycling=none recycling=cells,a=3 recycling=cells,even=0,a=3,size_term=true size_term=false".split()
    )
    changed += "even=0 even=1 t=1.5 t=3 voters=cls alpha=0.2 alpha=-0.2 beta=10".split()
    changed += ["layer=0", "layer=0,positions=compact", f"r1={1.6 * keep:.4g},r2=0.6"]
    return ["vflowopt", *(f"vflowopt,{own}" for own in changed)]


def stages(layers: int, keep: float) -> list[str]:
    """VFlowOpt's map before the LLM; behind it the map, the prompt's last token, or all of the question's."""
    third, two = round(layers / 3), round(2 * layers / 3)
    readers = ("vflowopt", "fastv", "question", "question(pooling=median)", "question(even=0.33)")
    found = ["auto", "vflowopt", "visionzip", "divprune", "cdpruner"]
    # Shares in multiples of the budget; the second is steeper.
    for first, second in ((1.2, 1.08), (1.9, 0.85)):
        begin, then = f"0:vflowopt:{first * keep:.4g}", f"{second * keep:.4g}"
        found += [f"auto,stages={begin};{third}:{own}:{then};{two}:{own}" for own in readers]
    ahead_of = ("vflowopt", "visionzip", "divprune", "cdpruner")
    return [*found, *(f"auto,stages=0:{own}:{1.1 * keep:.4g};{two}:fastv" for own in ahead_of)]


RELEASED = ("entropyprune,layer=1", f"entropyprune,layer=1,{FORM}")
LOW, LEAST = ("33%", "22%", "11%"), ("11%",)
BLIND = ("uniform", "random")
TIMED = ("--new-tokens", "16", "--time-batch", "1", "--rounds", "3")
UNTUNED = ("vflowopt", "merge", "merge,of=divprune")  # the first is what "auto" takes there
EXPERIMENTS = {
    "compare_small": Experiment(
        "small",
        1000,
        ["auto", "vflowopt", "merge,of=divprune", "cdpruner", *RELEASED, "fastv,layer=1"],
    ),
    "compare_smol": Experiment(
        "smol",
        400,
        ("auto", "vflowopt", "entropyprune", f"entropyprune,{FORM}", "fastv"),
        batch_size=25,
        more=TIMED,
    ),
    "methods_small": Experiment("small", 1000, every(",layer=1")),
    "methods_smol": Experiment("smol", 200, every(""), LEAST, batch_size=25),
    "auto_smol": Experiment("smol", 1000, ("auto",), LOW, (UNIFORM,), 25),
    "auto_unseen": Experiment(UNSEEN, 1000, UNTUNED, LOW, BLIND),
    "ablations_small": Experiment("small", 1000, parts(0.22), ("22%",), BLIND),
    "stages_small": Experiment("small", 300, stages(16, 0.11), LEAST, (UNIFORM,)),
    "stages_smol": Experiment("smol", 200, stages(30, 0.11), LEAST, (UNIFORM,), 25),
    "ahead_small": Experiment("small", 1000, ahead(1), (*LOW, "6%")),
    "ahead_smol": Experiment("smol", 200, ahead(2), (*LOW, "6%"), batch_size=25),
    "forms_small": Experiment("small", 500, forms(1), controls=(UNIFORM,)),
    "forms_smol": Experiment("smol", 300, forms(2), controls=(UNIFORM,), batch_size=25),
    "layers_small": Experiment(
        "small",
        500,
        [
            f"{own},layer={k}{form}"
            for k in range(1, 8)
            for own, form in (("entropyprune", ",source=hidden"), ("uniform", ""), ("random", ""))
        ],
        ("50%",),
        (UNIFORM,),
    ),
    "served_smol": Experiment(
        "smol",
        400,
        (
            "vflowopt",
            SERVED,
            f"{SERVED},recycling=none",
            f"{SERVED},recycling=none,even=0.75",
            "vflowopt,layer=0",
        ),
        ("33%",),
        batch_size=25,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run some of them, or print their commands."""
    parser = argparse.ArgumentParser(description="Comparisons on the testbeds' held-out questions.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--show", action="store_true", help="print the commands (default: of all)")
    parser.add_argument("--out", type=Path, default=Path("build/experiments"), help="answers, and reports")
    parser.add_argument("--results", type=Path, default=Path("eval/results"))
    options = parser.parse_args(argv)
    if unknown := set(options.names) - EXPERIMENTS.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or (EXPERIMENTS if options.show else ()):
        words = EXPERIMENTS[name].command(options.out / name)
        if options.show:
            print(f"{name}: {shlex.join(['tokenprune', *words])}")
            continue
        try:
            app(args=words, prog_name="tokenprune")
        except SystemExit as done:
            if done.code:
                raise
        shutil.copy(options.out / name / "compare.csv", options.results / f"{name}.csv")


if __name__ == "__main__":
    main()
