"""`luthier doctor`: what this machine offers, and what is missing."""

from __future__ import annotations

from luthier.cli.options import Json
from luthier.cli.show import print_checks, print_json


def doctor(json: Json = False) -> None:
    """Check versions, devices, precision, disk and cache; exits with 69 when something needed is missing.

    \b
    Examples:
      luthier doctor
      luthier doctor --json
    """
    from luthier.core.errors import MissingError
    from luthier.recipes.doctor import examine

    checks = examine()
    print_json({"checks": checks}) if json else print_checks(checks)
    failed = [check for check in checks if check["state"] == "missing"]
    if failed:
        names = ", ".join(check["what"] for check in failed)
        raise MissingError(
            f"needed and not there: {names}", do="; ".join(f"{check['what']}: {check['detail']}" for check in failed)
        )
