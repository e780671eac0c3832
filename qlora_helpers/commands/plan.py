"""`doctor` and `plan`: what this machine can do, and what would fit on it or on another."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qlora_helpers.base.profiles import PROFILES, profile_config
from qlora_helpers.commands import options as shared


def add(commands: Any) -> None:
    """Adds the commands to the parser's own.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    doctor = commands.add_parser("doctor", help="check this machine: packages, GPUs, disk, notebook")
    doctor.set_defaults(call=check_machine)
    doctor.add_argument("--json", action="store_true", help="print JSON")

    plan = commands.add_parser(
        "plan", help="predict what fits, how fast and at what price, before anything is downloaded"
    )
    plan.set_defaults(call=plan_run)
    plan.add_argument(
        "--model", help="hub id, folder with a config.json, or random:NAME (default: the profile's model)"
    )
    plan.add_argument(
        "--gpus",
        help="such as 4x24GiB, H100, 2xL4 or ml.g5.12xlarge (default: this machine's; without one, --model lists all that fit)",
    )
    plan.add_argument(
        "--price", type=float, help="USD an hour for all of the hardware (default: the catalogue's price)"
    )
    plan.add_argument(
        "--tokens", type=int, help="tokens of the training data, for time and price (default: looked up or counted)"
    )
    plan.add_argument(
        "--profile",
        choices=sorted(PROFILES),
        default="falcon-40b",
        help="the profile whose settings the plan starts from (default: %(default)s)",
    )
    shared.add_settings(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")


def check_machine(options: argparse.Namespace) -> int:
    """Prints the report on this machine; exit code 2 where something is missing that a training needs."""
    from qlora_helpers.machine.environment import check_machine

    report = check_machine()
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 2 if report.level == "failure" else 0


def plan_run(options: argparse.Namespace) -> int:
    """Prints what fits, how fast and at what price."""
    from qlora_helpers.planning.offers import find_offers
    from qlora_helpers.planning.run_plan import has_gpu, plan_run

    model = {"model.name": options.model} if options.model else {}
    config = profile_config(options.profile).with_settings(model).with_settings(options.settings)
    if options.model and not options.gpus and options.price is None and not has_gpu():
        found: Any = find_offers(config, tokens=options.tokens)
    else:
        found = plan_run(config, gpus=options.gpus, price=options.price, tokens=options.tokens)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0
