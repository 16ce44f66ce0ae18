"""Runs all checks in their order."""

from collections.abc import Iterator
from dataclasses import replace

from open_r1.base.errors import Mistake, first_line, printable
from open_r1.doctor import cost, data, environment, model, prompt, recipe, rewards
from open_r1.doctor.finding import Check, Finding, failed, skipped
from open_r1.doctor.run import Missing, Run
from open_r1.running.entry import silence

FAMILIES = {
    "environment": environment.CHECKS,
    "recipe": recipe.CHECKS,
    "data": data.CHECKS,
    "prompt": prompt.CHECKS,
    "rewards": rewards.CHECKS,
    "model": model.CHECKS,
    "cost": cost.CHECKS,
}
WIDTHS = {"verdict": 6, "family": 13, "name": 15}


def examine(run: Run) -> Iterator[Finding]:
    """Run the checks, of a recipe or (without one) of the machine alone."""
    families = list(FAMILIES.items()) if run.arguments else [("environment", environment.CHECKS)]
    for family, checks in families:
        for check in checks:
            name = check.__name__.replace("_", " ")
            yield from (replace(finding, family=family, name=name) for finding in run_check(check, run))


def run_check(check: Check, run: Run) -> Iterator[Finding]:
    """What a check finds, each finding once it is there, or why it found nothing more."""
    findings = check(run)
    try:
        while True:
            with silence():
                finding = next(findings, None)
            if finding is None:
                return
            yield finding
    except Missing as error:
        yield skipped(str(error))
    except (Mistake, OSError, RuntimeError) as error:  # RuntimeError: torch's, for shapes and memory
        yield failed(first_line(error))


def line(finding: Finding) -> str:
    """A row of the table; below what is not well stands what to do."""
    start = "".join(f"{getattr(finding, column):<{width}}" for column, width in WIDTHS.items())
    below = f"\n{'':{len(start)}}-> {finding.remedy}" if finding.remedy else ""
    return printable(f"{start}{' '.join(finding.what.split())}{below}")
