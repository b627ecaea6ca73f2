"""A network of its own for each process: namespaces on one bridge, whose links a test cuts, slows and makes lossy.

Needs root (CAP_NET_ADMIN), `ip` and `iptables`: see missing(). Slow and lossy links are netem's where the kernel has
it, and of iptables otherwise: what goes beyond a rate, or a share of all packets, is dropped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

PREFIX = f"lg{os.getpid() % 100_000}"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def missing() -> str:
    """Why there can be no such network here; "" where there can."""
    if not (shutil.which("ip") and shutil.which("iptables")):
        return "ip and iptables are needed (Debian: iproute2 iptables)"
    try:
        with networks(["probe"]) as made:
            made.cut("probe", made.gateway)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"network namespaces cannot be made (run as root): {said}"
    return ""


class Networks:
    def __init__(self, names: list[str]) -> None:
        subnet = f"10.213.{os.getpid() % 250}"
        self.gateway = f"{subnet}.1"  # the test itself, Redis and routers
        self.addresses = {name: f"{subnet}.{number}" for number, name in enumerate(names, 2)}
        self._netem = set[str]()

    def namespace(self, name: str) -> str:
        """Its file, for setns()."""
        return f"/run/netns/{PREFIX}-{name}"

    def cut(self, name: str, peer: str = "") -> None:
        """Nothing goes from there to `peer`, an address, or back; without one, to anybody."""
        for chain, way in (("INPUT", "-s"), ("OUTPUT", "-d")):
            self._iptables(name, "-A", chain, *((way, peer) if peer else ()), "-j", "DROP")

    def slow(self, name: str, bytes_per_s: int) -> None:
        """What leaves."""
        if self._add_netem(name, "rate", f"{bytes_per_s}bps"):
            return
        rate = f"{bytes_per_s // 1000}kb"
        limit = ["hashlimit", "--hashlimit-above", f"{rate}/s", "--hashlimit-burst", rate, "--hashlimit-name", "slow"]
        self._iptables(name, "-A", "OUTPUT", "-m", *limit, "-j", "DROP")

    def lose(self, name: str, share: float) -> None:
        """Of the packets that leave."""
        if self._add_netem(name, "loss", f"{share:.0%}"):
            return
        dice = ["statistic", "--mode", "random", "--probability", str(share)]
        self._iptables(name, "-A", "OUTPUT", "-m", *dice, "-j", "DROP")

    def hush(self, name: str) -> None:
        """No end of a connection is heard of outside, as of a host that lost its power."""
        for flag in ("FIN", "RST"):
            self._iptables(name, "-A", "OUTPUT", "-p", "tcp", "--tcp-flags", flag, flag, "-j", "DROP")

    def mend(self) -> None:
        for name in self.addresses:
            self._iptables(name, "-F")
            if name in self._netem:
                self._inside(name, "tc", "qdisc", "del", "dev", "eth0", "root")
        self._netem.clear()

    def _add_netem(self, name: str, *what: str) -> bool:
        try:
            self._inside(name, "tc", "qdisc", "add", "dev", "eth0", "root", "netem", *what)
        except (FileNotFoundError, subprocess.CalledProcessError):
            return False
        self._netem.add(name)
        return True

    def _iptables(self, name: str, *arguments: str) -> None:
        self._inside(name, "iptables", "-w", *arguments)

    def _inside(self, name: str, *command: str) -> None:
        _run("ip", "netns", "exec", f"{PREFIX}-{name}", *command)

    def build(self) -> None:
        _run("ip", "link", "add", PREFIX, "type", "bridge")
        _run("ip", "address", "add", f"{self.gateway}/24", "dev", PREFIX)
        _run("ip", "link", "set", PREFIX, "up")
        for number, (name, address) in enumerate(self.addresses.items()):
            namespace, outside = f"{PREFIX}-{name}", f"{PREFIX}.{number}"
            _run("ip", "netns", "add", namespace)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _run("ip", "link", "set", outside, "master", PREFIX, "up")
            self._inside(name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            self._inside(name, "ip", "link", "set", "eth0", "up")
            self._inside(name, "ip", "link", "set", "lo", "up")

    def remove(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            for name in self.addresses:
                _run("ip", "netns", "del", f"{PREFIX}-{name}")
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "link", "del", PREFIX)


@contextlib.contextmanager
def networks(names: list[str]) -> Iterator[Networks]:
    """Raises CalledProcessError where this process may not."""
    made = Networks(names)
    try:
        made.build()
        yield made
    finally:
        made.remove()
