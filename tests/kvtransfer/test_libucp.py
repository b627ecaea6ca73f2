"""The ctypes structures against the header that comes with the library, by the C compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvtransfer import libucp

STRUCTURES: dict[str, tuple[type[ctypes.Structure], dict[str, str]]] = {
    "ucp_params_t": (libucp.Params, {}),
    "ucp_worker_params_t": (libucp.WorkerParams, {}),
    "ucp_worker_attr_t": (libucp.WorkerAttributes, {}),
    "ucp_mem_map_params_t": (libucp.MapParams, {}),
    "ucp_mem_attr_t": (libucp.MemoryAttributes, {}),
    "ucs_sock_addr_t": (libucp.SocketAddress, {}),
    "ucp_ep_params_t": (
        libucp.EndpointParams,
        {"err_handler_cb": "err_handler.cb", "err_handler_arg": "err_handler.arg"},
    ),
    "ucp_am_handler_param_t": (libucp.MessageHandlerParams, {}),
    "ucp_request_param_t": (libucp.RequestParams, {}),
}
CONSTANTS = {
    "UCP_FEATURE_RMA": libucp.FEATURE_RMA,
    "UCP_FEATURE_WAKEUP": libucp.FEATURE_WAKEUP,
    "UCP_FEATURE_AM": libucp.FEATURE_AM,
    "UCS_THREAD_MODE_SERIALIZED": libucp.THREAD_MODE_SERIALIZED,
    "UCP_ERR_HANDLING_MODE_PEER": libucp.ERR_HANDLING_MODE_PEER,
    "UCP_MEM_MAP_ALLOCATE": libucp.MEM_MAP_ALLOCATE,
    "UCP_AM_SEND_FLAG_EAGER": libucp.AM_SEND_FLAG_EAGER,
    "UCP_AM_SEND_FLAG_COPY_HEADER": libucp.AM_SEND_FLAG_COPY_HEADER,
    "UCP_AM_FLAG_WHOLE_MSG": libucp.AM_FLAG_WHOLE_MESSAGE,
    "UCP_EP_CLOSE_FLAG_FORCE": libucp.CLOSE_FLAG_FORCE,
    "UCP_OP_ATTR_FIELD_FLAGS": libucp.OP_FIELD_FLAGS,
    "UCP_OP_ATTR_FIELD_DATATYPE": libucp.OP_FIELD_DATATYPE,
    "UCP_DATATYPE_IOV": libucp.DATATYPE_IOV,
    "sizeof(ucp_dt_iov_t)": 16,  # kvtransfer/vectors.py makes them of two numbers of eight bytes
    "offsetof(ucp_dt_iov_t, length)": 8,
    "UCS_OK": libucp.OK,
    "UCS_INPROGRESS": libucp.IN_PROGRESS,
    "UCS_ERR_BUSY": libucp.ERR_BUSY,
    "UCS_ERR_EXCEEDS_LIMIT": libucp.ERR_EXCEEDS_LIMIT,
    "UCP_PARAM_FIELD_FEATURES": libucp.Params.FEATURES,
    "UCP_PARAM_FIELD_MT_WORKERS_SHARED": libucp.Params.MT_WORKERS_SHARED,
    "UCP_WORKER_PARAM_FIELD_THREAD_MODE": libucp.WorkerParams.THREAD_MODE,
    "UCP_WORKER_ATTR_FIELD_ADDRESS": libucp.WorkerAttributes.ADDRESS,
    "UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER": libucp.WorkerAttributes.MAX_AM_HEADER,
    "UCP_MEM_MAP_PARAM_FIELD_ADDRESS": libucp.MapParams.ADDRESS,
    "UCP_MEM_MAP_PARAM_FIELD_LENGTH": libucp.MapParams.LENGTH,
    "UCP_MEM_MAP_PARAM_FIELD_FLAGS": libucp.MapParams.FLAGS,
    "UCP_MEM_ATTR_FIELD_ADDRESS": libucp.MemoryAttributes.ADDRESS,
    "UCP_EP_PARAM_FIELD_REMOTE_ADDRESS": libucp.EndpointParams.REMOTE_ADDRESS,
    "UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE": libucp.EndpointParams.ERR_HANDLING_MODE,
    "UCP_EP_PARAM_FIELD_ERR_HANDLER": libucp.EndpointParams.ERR_HANDLER,
    "UCP_AM_HANDLER_PARAM_FIELD_ID": libucp.MessageHandlerParams.ID,
    "UCP_AM_HANDLER_PARAM_FIELD_FLAGS": libucp.MessageHandlerParams.FLAGS,
    "UCP_AM_HANDLER_PARAM_FIELD_CB": libucp.MessageHandlerParams.CALLBACK,
}


def _headers() -> Path | None:
    found = importlib.util.find_spec("libucx")
    folder = Path(found.origin).parent / "include" if found and found.origin else None
    return folder if folder and (folder / "ucp/api/ucp.h").exists() else None


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc") or not _headers(), reason="no compiler or header")
def test_layouts_and_constants_are_those_of_the_header(tmp_path: Path) -> None:
    ours: dict[str, int] = dict(CONSTANTS)
    program = ["#include <stddef.h>", "#include <stdio.h>", "#include <ucp/api/ucp.h>", "int main(void) {"]
    program += [f'printf("{name} %lld\\n", (long long)({name}));' for name in CONSTANTS]
    for name, (structure, renamed) in STRUCTURES.items():
        if not any(field[0] == "_tail" for field in structure._fields_):
            sizes = "<=" if name in ("ucp_params_t", "ucp_worker_params_t") else "=="  # the header may have grown
            ours[f"fits:{name}"] = 1
            program.append(f'printf("fits:{name} %d\\n", {ctypes.sizeof(structure)} {sizes} sizeof({name}));')
        else:
            ours[f"fits:{name}"] = 1
            program.append(f'printf("fits:{name} %d\\n", {ctypes.sizeof(structure)} >= sizeof({name}));')
        for field, *_ in structure._fields_:
            if field != "_tail":
                theirs = renamed.get(field, field)
                ours[f"{name}.{field}"] = getattr(structure, field).offset
                program.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {theirs}));')
    source = tmp_path / "layout.c"
    source.write_text("\n".join([*program, "return 0; }"]))
    subprocess.run(["cc", f"-I{_headers()}", str(source), "-o", str(tmp_path / "layout")], check=True)
    printed = subprocess.run([str(tmp_path / "layout")], capture_output=True, text=True, check=True).stdout
    header = {line.rsplit(" ", 1)[0]: int(line.rsplit(" ", 1)[1]) for line in printed.splitlines()}
    assert header == ours


def test_a_machine_without_libucp_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from spec.errors import TransportUnavailable

    monkeypatch.setattr(libucp, "_wheel_folder", lambda: Path("/nowhere"))
    libucp.load.cache_clear()
    with pytest.raises(TransportUnavailable, match="libucx"):
        libucp.load()
    libucp.load.cache_clear()
