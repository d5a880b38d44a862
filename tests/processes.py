"""Real processes that train together over gloo, each with one thread."""

import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import socket
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def together(ranks: int, target: str, folder: Path, *arguments: Any) -> list[Any]:
    """What ``module:function(*arguments)`` returned on each rank; module is the path of a test file.

    The child loads the test file itself, because pytest's modules cannot be imported by name.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["regrow.bert.pretrain"])
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    variables["REGROW_CACHE"] = os.environ.get("REGROW_CACHE", "")
    results = [folder / f"result-{rank}.pt" for rank in range(ranks)]
    processes = [
        context.Process(
            target=_child, args=(target, variables | {"RANK": str(r), "LOCAL_RANK": str(r)}, results[r], arguments)
        )
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    waiting = {process.sentinel: process for process in processes}
    while waiting:
        ended = [waiting.pop(sentinel) for sentinel in multiprocessing.connection.wait(waiting, timeout=120)]
        for process in ended:
            process.join()
        if not ended or any(process.exitcode for process in ended):  # the others would wait for it
            for process in waiting.values():
                process.kill()
    assert all(path.exists() for path in results), "a rank failed or hung; see above"
    return [torch.load(path, weights_only=False) for path in results]


def _child(target: str, variables: dict[str, str], result: Path, arguments: tuple) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    path, _, function = target.rpartition(":")
    spec = importlib.util.spec_from_file_location("the_test", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        torch.save(getattr(module, function)(*arguments), result)
    except Exception:
        traceback.print_exc()
        os._exit(1)  # without the farewells that wait for the others
    if dist.is_initialized():
        dist.destroy_process_group()
