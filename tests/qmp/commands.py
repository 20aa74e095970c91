"""Goes through QMP's commands and events with QEMU's own client, and fails where an answer is not
what QEMU's schema (qapi/*.json) and its error texts say. It runs on minivmm and on QEMU itself."""

import asyncio
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient

# Types of the members that programs rely on.
STATUS = {"running": bool, "status": str}
CPU = {"cpu-index": int, "qom-path": str, "thread-id": int, "props": dict, "target": str}
RX_FILTER = {
    "name": str, "promiscuous": bool, "multicast": str, "unicast": str, "vlan": str,
    "broadcast-allowed": bool, "multicast-overflow": bool, "unicast-overflow": bool,
    "main-mac": str, "vlan-table": list, "unicast-table": list, "multicast-table": list,
}
BLOCK = {"device": str, "type": str, "removable": bool, "locked": bool, "inserted": dict}
INSERTED = {
    "file": str, "node-name": str, "ro": bool, "drv": str, "backing_file_depth": int,
    "encrypted": bool, "detect_zeroes": str, "bps": int, "bps_rd": int, "bps_wr": int,
    "iops": int, "iops_rd": int, "iops_wr": int, "image": dict, "cache": dict,
    "write_threshold": int,
}
IMAGE = {"filename": str, "format": str, "virtual-size": int}
CACHE = {"writeback": bool, "direct": bool, "no-flush": bool}
VERSION = {"major": int, "minor": int, "micro": int}


def check(types, value):
    """Each of these members is there with its type."""
    for name, kind in types.items():
        assert type(value.get(name)) is kind, (name, value)
    return value


async def fails(client, command, arguments, desc, kind="GenericError"):
    try:
        answer = await client.execute(command, arguments)
    except ExecuteError as error:
        assert error.error.error.desc == desc, error
        assert error.error.error.class_ == kind, error
        return
    raise AssertionError(f"{command} {arguments}: {answer}")


async def nothing(client, command, **arguments):
    answer = await client.execute(command, arguments)
    assert answer == {}, (command, answer)


async def human(client, line):
    return await client.execute("human-monitor-command", {"command-line": line})


async def server(client):
    await fails(client, "nonsense", {}, "The command nonsense has not been found",
                "CommandNotFound")
    await fails(client, "qmp_capabilities", {},
                "Capabilities negotiation is already complete, command ignored",
                "CommandNotFound")
    await fails(client, "query-status", {"x": 1}, "Parameter 'x' is unexpected")
    names = [command["name"] for command in await client.execute("query-commands")]
    for name in [
        "announce-self", "balloon", "block_resize", "cont", "human-monitor-command",
        "qmp_capabilities", "query-balloon", "query-block", "query-commands", "query-cpus-fast",
        "query-kvm", "query-name", "query-rx-filter", "query-status", "query-version", "quit", "set_link",
        "stop", "system_powerdown",
    ]:
        assert names.count(name) == 1, (name, names)
    version = await client.execute("query-version")
    check(VERSION, version["qemu"])
    assert isinstance(version["package"], str)
    assert version == client.greeting.QMP.version


async def cpus(client, name):
    found = await client.execute("query-cpus-fast")
    assert [check(CPU, cpu)["cpu-index"] for cpu in found] == [0, 1]
    assert len({cpu["thread-id"] for cpu in found}) == 2
    check({"enabled": bool, "present": bool}, await client.execute("query-kvm"))
    assert await client.execute("query-name") == {"name": name}


async def nics(client):
    nics = await client.execute("query-rx-filter")
    name, mac = check(RX_FILTER, nics[0])["name"], nics[0]["main-mac"]
    assert len(mac.split(":")) == 6
    assert await client.execute("query-rx-filter", {"name": name}) == nics[:1]
    await fails(client, "query-rx-filter", {"name": "none"}, "invalid net client name: none")
    assert f"type=nic,model=virtio-net" in await human(client, "info network")
    assert f"macaddr={mac}" in await human(client, "info network")
    await fails(client, "set_link", {"name": "none", "up": True}, "Device 'none' not found",
                "DeviceNotFound")
    await fails(client, "set_link", {"name": name}, "Parameter 'up' is missing")
    await fails(client, "set_link", {"name": name, "up": "on"},
                "Invalid parameter type for 'up', expected: boolean")
    await nothing(client, "set_link", name=name, up=False)
    await nothing(client, "set_link", name=name, up=True)
    rounds = {"initial": 50, "max": 550, "rounds": 5, "step": 50}
    await nothing(client, "announce-self", **rounds)
    await nothing(client, "announce-self", **rounds, interfaces=[name], id="other")
    await fails(client, "announce-self", {"initial": 50}, "Parameter 'max' is missing")


async def disks(client):
    first, second = await client.execute("query-block")
    name = check(BLOCK, first)["device"]
    image = check(IMAGE, check(INSERTED, first["inserted"])["image"])
    check(CACHE, first["inserted"]["cache"])
    assert first["inserted"]["drv"] == "raw" and not first["inserted"]["ro"]
    assert second["inserted"]["drv"] == "qcow2" and second["inserted"]["ro"]
    shown = await human(client, "info block")
    assert f"{first['inserted']['file']} (raw)\r\n" in shown, shown
    assert f"{second['inserted']['file']} (qcow2, read-only)\r\n" in shown, shown

    size = image["virtual-size"] + (1 << 20)
    await nothing(client, "block_resize", device=name, size=size)
    await nothing(client, "block_resize", device=name, size=size)
    first, _ = await client.execute("query-block")
    assert first["inserted"]["image"]["virtual-size"] == size
    for arguments, desc in [
        ({"device": "none", "size": size}, "Cannot find device='none' nor node-name=''"),
        ({"node-name": "none", "size": size}, "Cannot find device='' nor node-name='none'"),
        ({"size": size}, "Cannot find device='' nor node-name=''"),
        ({"device": name, "size": -1}, "Parameter 'size' expects a >0 size"),
        ({"device": name}, "Parameter 'size' is missing"),
        ({"device": name, "size": 1.5}, "Invalid parameter type for 'size', expected: integer"),
        ({"device": name, "size": 2**64}, "Invalid parameter type for 'size', expected: integer"),
        ({"device": 1, "size": size}, "Invalid parameter type for 'device', expected: string"),
        ({"device": name, "size": size, "x": 1}, "Parameter 'x' is unexpected"),
    ]:
        await fails(client, "block_resize", arguments, desc)
    try:
        await client.execute("block_resize", {"device": second["device"], "size": size * 2})
    except ExecuteError:
        pass
    else:
        raise AssertionError("a disk that is read alone was resized")


async def balloon(client):
    memory = 128 << 20
    found = await client.execute("query-balloon")
    assert found == {"actual": memory}, found
    await nothing(client, "balloon", value=memory // 2)
    await nothing(client, "balloon", value=memory * 2)
    await fails(client, "balloon", {"value": 0}, "Parameter 'target' expects a size")
    await fails(client, "balloon", {}, "Parameter 'value' is missing")


async def running(client):
    """The guest stops and goes on, and all of that shows."""

    async def status(name):
        found = check(STATUS, await client.execute("query-status"))
        assert (found["status"], found["running"]) == (name, name == "running"), found
        assert await human(client, "info status") == f"VM status: {name}\r\n"

    await status("running")
    for _ in range(2):
        await nothing(client, "stop")
    await status("paused")
    for _ in range(2):
        await nothing(client, "cont")
    await status("running")
    await nothing(client, "system_powerdown")


async def human_monitor(client):
    for line in ["nonsense", "info nonsense"]:
        assert await human(client, line) == f"unknown command: '{line}'\r\n"
    assert await human(client, "") == ""
    await fails(client, "human-monitor-command", {}, "Parameter 'command-line' is missing")


async def expect_events(listener):
    """Each client gets all of them, in order."""
    names = []
    while "SHUTDOWN" not in names:
        event = await asyncio.wait_for(listener.get(), 60)
        check({"seconds": int, "microseconds": int}, event["timestamp"])
        if event["event"] in ["STOP", "RESUME", "POWERDOWN", "SHUTDOWN"]:
            names.append(event["event"])
    assert names == ["STOP", "RESUME", "POWERDOWN", "SHUTDOWN"], names
    assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}, event


async def main():
    path, name = sys.argv[1:]
    client, other = QMPClient("first"), QMPClient("second")
    await client.connect(path)
    await other.connect(path)
    listeners = [EventListener(), EventListener()]
    client.register_listener(listeners[0])
    other.register_listener(listeners[1])

    await server(client)
    await cpus(client, name)
    await nics(client)
    await disks(client)
    await balloon(client)
    await human_monitor(client)
    await running(client)
    await fails(client, "quit", {"x": 1}, "Parameter 'x' is unexpected")
    await nothing(client, "quit")
    for listener in listeners:
        await expect_events(listener)
    for each in [client, other]:
        try:
            await each.disconnect()
        except (EOFError, ConnectionError):
            pass  # the server is gone first
    print("all commands and events")


asyncio.run(main())
