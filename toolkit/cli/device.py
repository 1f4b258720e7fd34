"""Commands for the machines that engines are measured on: device add, list, check, remove."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from vitkit.cli.arguments import DevicesFile, JsonFlag
from vitkit.cli.show import print_json, print_table, say

if TYPE_CHECKING:
    from vitkit.devices.registry import Device

device = typer.Typer(help="Machines to measure on: kept in devices.toml.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="Name of the device.")]
# What a device does not need: it runs engines, it does not make them.
_AT_HOME = ("train: ", "export: ")


@device.command()
def add(
    name: Annotated[str, typer.Argument(help="Its name: letters, digits, '.', '_' and '-'.")],
    address: Annotated[
        str,
        typer.Option(help="What ssh takes: USER@HOST, a name of your SSH configuration, ssh://HOST:PORT."),
    ] = "",
    kind: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="ssh, jetson (ssh to a Jetson), adb (a phone), local: another Python here (ssh)."),
    ] = None,
    python: Annotated[
        str, typer.Option(help="Its Python, 3.10 or newer, with the vendors' packages.")
    ] = "python3",
    folder: Annotated[str, typer.Option(help="Folder on it for files that are sent.")] = "~/.cache/vitkit",
    target: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--target", help="A target that it is meant to run; may repeat (any target)."),
    ] = None,
    tool: Annotated[
        str, typer.Option(help="For a phone: your benchmark_model binary, a file on this machine.")
    ] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Replace an entry of that name.")] = False,
    devices: DevicesFile = None,
) -> None:
    """Add a device. Nothing is sent to it; `vitkit device check NAME` tries it."""
    from vitkit.devices.registry import Device, default_file, read_devices, write_devices
    from vitkit.runtimes.errors import BadRequest

    file = devices or default_file()
    known = read_devices(file)
    if name in known and not replace:
        raise BadRequest(f"{file} has a device {name!r} already; to change it, add --replace")
    entry = Device(name, kind or "ssh", address, python, folder, tuple(target or ()), tool)
    write_devices({**known, name: entry}, file)
    say(f"{name} is in {file}; try it with: vitkit device check {name}")


@device.command("list")
def list_(devices: DevicesFile = None, json: JsonFlag = False) -> None:
    """List the devices."""
    from dataclasses import asdict

    from vitkit.devices.registry import default_file, read_devices

    file = devices or default_file()
    known = read_devices(file)
    if json:
        print_json([asdict(entry) for entry in known.values()])
    elif known:
        columns = ("name", "kind", "address", "python", "folder", "targets")
        rows = [
            (e.name, e.kind, e.address, e.python, e.folder, " ".join(e.targets) or "any")
            for e in known.values()
        ]
        print_table(columns, rows, title=str(file))
    else:
        say(f"{file} names no device; add one with: vitkit device add NAME --address USER@HOST")


@device.command()
def check(name: NameArgument, devices: DevicesFile = None, json: JsonFlag = False) -> None:
    """Reach a device and let it diagnose itself; exit code 1 if a target that it is meant for fails."""
    from rich.console import Console

    from vitkit import doctor
    from vitkit.devices.link import Link

    entry = _entry(name, devices)
    if entry.kind == "adb":
        from vitkit.devices.android import facts

        about = facts(entry)
        if json:
            print_json({"device": name, "ok": True, **about})
        else:
            print_table(("phone", name), list(about.items()))
        return
    with Link(entry) as link:
        found = link.check()
    findings = [one for one in found.findings if not one.name.startswith(_AT_HOME)]
    missing = [one.name for one in findings if not one.ok and one.name in {f"run {t}" for t in entry.targets}]
    wrong_kind = entry.kind == "jetson" and not found.jetson
    if json:
        body = {"device": name, "python": found.python, "jetson": found.jetson}
        print_json({**body, "ok": not missing and not wrong_kind, "checks": doctor.to_json(findings)})
    else:
        Console().print(doctor.table(findings))
    if wrong_kind:
        say(f"{name} is no Jetson")
    if missing:
        say(f"{name} is meant for these, which do not work there: {', '.join(missing)}")
    if missing or wrong_kind:
        raise typer.Exit(1)


@device.command()
def remove(name: NameArgument, devices: DevicesFile = None) -> None:
    """Forget a device. What is kept in its folder stays there."""
    from vitkit.devices.registry import default_file, read_devices, write_devices

    file = devices or default_file()
    entry = _entry(name, devices)
    write_devices({key: value for key, value in read_devices(file).items() if key != name}, file)
    say(f"{name} is no longer in {file}; on the device, its files are in {entry.folder}")


def _entry(name: str, devices: Path | None) -> Device:
    from vitkit.devices.registry import default_file, read_devices
    from vitkit.runtimes.errors import BadRequest

    file = devices or default_file()
    known = read_devices(file)
    if name not in known:
        raise BadRequest(
            f"{file} names no device {name!r}, it has {', '.join(known) or 'none'}; add it with: "
            f"vitkit device add {name} --address USER@HOST"
        )
    return known[name]
