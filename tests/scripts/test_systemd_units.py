"""The units: every directive is one that systemd knows, and what they start is a command line of this server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.command_line import parse_serve
from engine.launcher.supervise import DRAIN_MARGIN, END_GRACE

UNITS = Path(__file__).resolve().parents[2] / "scripts" / "systemd"
SERVICES = ("tokenmill.service", "tokenmill@.service")
SOCKETS = ("tokenmill.socket", "tokenmill@.socket")
KNOWN = {
    "Unit": "Description Wants After StartLimitIntervalSec StartLimitBurst",
    "Install": "WantedBy",
    "Socket": "ListenStream FileDescriptorName Backlog NoDelay",
    "Service": """
        Type NotifyAccess EnvironmentFile ExecStart TimeoutStartSec TimeoutStopSec WatchdogSec Restart RestartSec
        RestartPreventExitStatus KillMode OOMPolicy DynamicUser User UMask RuntimeDirectory RuntimeDirectoryMode
        StateDirectory CacheDirectory WorkingDirectory Environment LimitNOFILE LimitCORE TasksMax OOMScoreAdjust
        NoNewPrivileges CapabilityBoundingSet AmbientCapabilities ProtectSystem ProtectHome PrivateTmp PrivateDevices
        PrivateUsers ProtectClock ProtectControlGroups ProtectHostname ProtectKernelLogs ProtectKernelModules
        ProtectKernelTunables ProtectProc LockPersonality MemoryDenyWriteExecute RemoveIPC RestrictAddressFamilies
        RestrictNamespaces RestrictRealtime RestrictSUIDSGID KeyringMode SystemCallArchitectures SystemCallFilter
        SystemCallErrorNumber
    """,
}
"""What systemd.unit(5), systemd.service(5), systemd.socket(5), systemd.exec(5) and systemd.kill(5) name."""

Settings = dict[str, dict[str, list[str]]]


def read_unit(name: str) -> Settings:
    """Section → directive → its values, in their order."""
    unit: Settings = {}
    for line in (UNITS / name).read_text().splitlines():
        if line.startswith("["):
            section = unit.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            directive, equals, value = line.partition("=")
            assert equals and not directive.endswith(" "), line
            section.setdefault(directive, []).append(value)
    return unit


def read_environment(name: str) -> dict[str, str]:
    lines = [line for line in (UNITS / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def uncommented(name: str, directive: str) -> list[str]:
    """The values of a directive, those in comments too."""
    lines = (UNITS / name).read_text().splitlines()
    return [line.lstrip("#").partition("=")[2] for line in lines if line.lstrip("#").startswith(f"{directive}=")]


@pytest.mark.parametrize("name", [*SERVICES, *SOCKETS])
def test_every_directive_is_known(name: str) -> None:
    unit = read_unit(name)
    for section, directives in unit.items():
        assert directives.keys() <= set(KNOWN[section].split()), section
    for directive, values in unit.get("Service", {}).items():
        assert len(values) == 1 or directive in ("Environment", "EnvironmentFile", "SystemCallFilter"), directive


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_started_is_a_command_line_of_the_server(name: str) -> None:
    commands = [command for command in uncommented(name, "ExecStart") if command]
    assert len(commands) == 2
    flags = read_environment("tokenmill.env")["TOKENMILL_FLAGS"]
    for command in commands:
        words = command.replace("$TOKENMILL_FLAGS", flags).replace("%i", "07").split()
        assert words[:2] == ["/opt/tokenmill/bin/tokenmill", "serve"]
        if "%d/settings.yaml" in words:
            words[words.index("%d/settings.yaml")] = "/dev/null"
        parsed = parse_serve(words[2:])
        assert parsed.warnings == []
        assert parsed.config.port == (30007 if "@" in name else 30000)
        stop = float(read_unit(name)["Service"]["TimeoutStopSec"][0])
        assert stop > parsed.config.drain_timeout + DRAIN_MARGIN + END_GRACE
    for example in uncommented("tokenmill.env", "TOKENMILL_FLAGS"):
        parse_serve(example.split())


@pytest.mark.parametrize(("service", "socket"), list(zip(SERVICES, SOCKETS, strict=True)))
def test_the_socket_is_where_the_service_would_serve_by_itself(service: str, socket: str) -> None:
    (address,) = read_unit(socket)["Socket"]["ListenStream"]
    (command,) = read_unit(service)["Service"]["ExecStart"]
    config = parse_serve(command.replace("%i", "07").split()[2:-1]).config
    assert address.replace("%i", "07") == f"{config.host}:{config.port}"


def test_the_template_differs_only_where_an_instance_must() -> None:
    one, many = (read_unit(name)["Service"] for name in SERVICES)
    assert one.keys() == many.keys()
    differ = {directive for directive in one if one[directive] != many[directive]}
    assert differ == {"ExecStart", "EnvironmentFile", "RuntimeDirectory", "Environment"}
    assert many["RuntimeDirectory"] == ["tokenmill-%i"]  # and it is the folder of the sockets
    assert "XDG_RUNTIME_DIR=%t/tokenmill-%i" in many["Environment"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_has_nothing_to_say_against_them(tmp_path: Path) -> None:
    for name in (*SERVICES, *SOCKETS):
        text = (UNITS / name).read_text().replace("/opt/tokenmill/bin/tokenmill", sys.executable)
        (tmp_path / name).write_text(text)
    names = [name.replace("@", "@07") for name in (*SERVICES, *SOCKETS)]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(f"./{name}" for name in names)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    ours = [line for line in said.splitlines() if "tokenmill" in line]
    assert done.returncode == 0 and not ours, said
    for name in SERVICES:
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", f"./{name}"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr  # its exposure is at most 2.0 of 10
