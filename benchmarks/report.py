"""Run benchmarks and keep what they print; write RESULTS.md from it, so that no figure is typed by hand.

python benchmarks/report.py run obs obs.py --threads 1    # run a script and keep its output in results/obs.json
python benchmarks/report.py                               # write RESULTS.md from results/*.json
python benchmarks/report.py --check                       # fail if RESULTS.md is not what results/*.json say
"""

import argparse
import ast
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from timing import machine

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
# which instructions the libraries may use, to measure on a machine what others would show
VARIABLES = ("BLOCKPRUNE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
INTRODUCTION = """# Results

What the benchmarks printed: the question, the answer in a sentence, the command, the machine, the commit (with a plus sign where files of
the package had changed) and the output. `python benchmarks/report.py run NAME SCRIPT ...` runs a script and keeps its output in
`results/NAME.json`; `python benchmarks/report.py` writes this page. Ratios are medians of candidates that took turns in one run.
"""


def run(name: str, script: str, arguments: list[str]) -> None:
    """Run a script, show what it prints, and keep it."""
    start, lines = time.monotonic(), []
    command, called = [sys.executable, str(FOLDER / script), *arguments], ["python", f"benchmarks/{script}", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        sys.exit(f"{script} failed; nothing was recorded")
    recorded = {
        "script": script,
        "question": (ast.get_docstring(ast.parse((FOLDER / script).read_text())) or script).splitlines()[0],
        "command": shlex.join([*(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ), *called]),
        "machine": machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "output": [line for line in lines if not line.startswith("In short: ")],
        "answer": " ".join(line.removeprefix("In short: ") for line in lines if line.startswith("In short: ")),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


def commit() -> str:
    """The commit of the code, with a plus sign if files of the package have changed since."""
    git = ["git", "-C", str(FOLDER.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "blockprune"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


def report(runs: list[dict[str, Any]]) -> str:
    """The text of RESULTS.md: a section for each script, and in it each run."""
    sections = [INTRODUCTION]
    for script in sorted({recorded["script"] for recorded in runs}):
        of_script = [recorded for recorded in runs if recorded["script"] == script]
        sections.append(f"## {script}\n\n{of_script[0]['question']}\n")
        sections += [section(recorded) for recorded in of_script]
    return "\n".join(sections)


def earlier() -> str:
    """What was measured before runs were recorded, with the code of that time."""
    text = (RESULTS / "earlier.md").read_text().replace("\n## ", "\n### ")
    return f"\n## Measured before runs were recorded\n\nWith earlier code: what takes hours, a GPU or other engines.\n\n#{text}"


def section(recorded: dict[str, Any]) -> str:
    """The answer, the source and the output of a run."""
    source = (
        f"`{recorded['command']}` ({recorded['minutes']} minutes): {recorded['machine']}; commit {recorded['commit']}, {recorded['date']}."
    )
    output = "\n".join(recorded["output"]).strip("\n")
    answer = [f"**{recorded['answer']}**", ""] if recorded["answer"] else []
    return "\n".join([*answer, source, "", "```text", output, "```", ""])


def main(check: bool) -> None:
    text = report([json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]) + earlier()
    path = FOLDER / "RESULTS.md"
    if not check:
        path.write_text(text)
    elif path.read_text() != text:
        sys.exit("benchmarks/RESULTS.md is not what benchmarks/results/*.json say; run python benchmarks/report.py")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare RESULTS.md with the recorded runs")
    subparsers = parser.add_subparsers(dest="action")
    runner = subparsers.add_parser("run", help="run a script and keep its output")
    runner.add_argument("name", help="of the file in results/")
    runner.add_argument("script", help="a file in benchmarks/")
    runner.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    options = parser.parse_args()
    if options.action == "run":
        run(options.name, options.script, options.arguments)
    else:
        main(options.check)
