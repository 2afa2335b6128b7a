"""What a verification found, for people, for JSON and for the cache: cheap to import, since the warm path needs its key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspace.runtime import versions
from dspace.runtime.cache import Entry, digest

if TYPE_CHECKING:
    from rich.table import Table

    from dspace.runtime.compare import Check

FORMS = ("chunk", "recurrent", "reference")
"""The public functions of a generated module, by prefix."""


@dataclass(frozen=True)
class Certificate:
    """What verification found of one module on one machine; ``passed`` is the verdict."""

    name: str
    spec_hash: str
    emitter_version: str
    libraries: dict[str, str]
    device: str
    device_name: str
    letter: str
    quick: bool
    seed: int
    seconds: float
    created: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """No check failed, and every form was really compared with something."""
        compared = {c.form for c in self.checks if c.status == "ok"}
        return not self.failures() and compared.issuperset(FORMS)

    def failures(self) -> list[Check]:
        """The checks that failed, the worst first."""
        failed = [c for c in self.checks if c.status == "failed"]
        return sorted(failed, key=lambda c: -(c.error / c.budget if c.error == c.error else float("inf")))

    def worst(self) -> list[Check]:
        """For each form, dtype and quantity the check that came closest to its budget, or that failed."""
        found: dict[tuple[str, str, str], Check] = {}
        for check in self.checks:
            key = (check.form, check.dtype, check.quantity)
            if key not in found or _severity(check) > _severity(found[key]):
                found[key] = check
        return list(found.values())

    def as_dict(self) -> dict[str, Any]:
        """The certificate as JSON sees it."""
        fields = {k: v for k, v in vars(self).items() if k != "checks"}
        return fields | {"passed": self.passed, "checks": [c.as_dict() for c in self.checks]}

    def table(self) -> Table:
        """A table for the terminal: the worst error of every quantity and form beside its budget, then the failures."""
        from rich.table import Table

        verdict = "certified" if self.passed else "REFUSED"
        undefined = sum(c.status == "undefined" for c in self.checks)
        caption = [f"relative RMS errors, worst case; {len(self.checks)} checks in {self.seconds:.1f} s"]
        if undefined:
            caption.append(f"{undefined} checks where the recurrence itself is not finite, in float64 or in float32")
        caption += [f"failed: {c.describe()}" for c in self.failures()[:8]]
        table = Table(title=f"{self.name}: {verdict} on {self.device_name}", caption="\n".join(caption))
        table.add_column("dtype")
        table.add_column("quantity")
        for column in (*FORMS, "budget"):
            table.add_column(column, justify="right")
        worst = {(c.dtype, c.quantity, c.form): c for c in self.worst() if c.quantity != "call"}
        for dtype, quantity in dict.fromkeys((d, q) for d, q, _ in worst):
            row = [worst.get((dtype, quantity, form)) for form in FORMS]
            budgets = dict.fromkeys(f"{c.budget:.0e}" for c in row if c is not None)
            table.add_row(dtype, quantity, *(_cell(c) for c in row), ", ".join(budgets))
        return table


def certificate_key(entry: Entry, device: str, quick: bool) -> str:
    """Key of a certificate: the module's text, the compiler, the libraries and the hardware that ran it."""
    libraries = [f"{n}={v}" for n, v in sorted(versions.library_versions().items())]
    return digest(
        "certificate",
        "quick" if quick else "full",
        entry.spec_hash,
        entry.sha256,
        versions.emitter_version(),
        *libraries,
        versions.device_name(device),
    )


def refusal(certificate: Certificate) -> str:
    """Why a module was not handed out, and what to do."""
    failed = certificate.failures()
    lines = [
        f"the kernels of {certificate.name!r} disagree with the float64 oracle on {certificate.device_name}:",
        *(f"  {check.describe()}" for check in failed[:5]),
    ]
    if len(failed) > 5:
        lines.append(f"  and {len(failed) - 5} more")
    lines += [
        f"  cure: run `dspace verify {certificate.name}` for the whole table and `dspace doctor` for known-bad versions;",
        f"  dspace.compile(..., certify=False) hands the module out unchecked: its reference_{certificate.name} is plain PyTorch",
    ]
    return "\n".join(lines)


def _cell(check: Check | None) -> str:
    """A check as one cell of the table."""
    if check is None:
        return ""
    style = {"ok": "yellow" if check.note else "green", "failed": "bold red", "undefined": "yellow"}[check.status]
    text = f"{check.error:.1e}" if check.error == check.error else check.status
    return f"[{style}]{text}[/]"


def _severity(check: Check) -> float:
    if check.status == "failed":
        return float("inf")
    return -1.0 if check.status == "undefined" else check.error / check.budget
