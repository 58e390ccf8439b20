"""Runs `serve_forever` with a tiny Serve application in the gateway's place: what is tested is start and stop.

Usage: python serve_standin.py CONFIG [slow|stubborn|broken]
"""

import os
import signal
import sys
import time
from pathlib import Path

from signalbox.serving.config import Config, load_config
from signalbox.serving.graph import serve_forever

MANNER = sys.argv[2] if len(sys.argv) > 2 else ""


def build_app(config: Config, store_url: str):  # type: ignore[no-untyped-def]
    import logging

    from ray import serve
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    manner = MANNER
    if manner == "broken":
        raise ValueError("the graph cannot be built")

    @serve.deployment(ray_actor_options={"num_cpus": 0.01})
    class Expert:
        def __init__(self) -> None:
            if manner == "stubborn":  # a process that ignores every polite request to end, and has a child
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                import subprocess

                subprocess.Popen(["sleep", "1000"], start_new_session=True)

        def __del__(self) -> None:
            if manner == "stubborn":
                time.sleep(1000)

        async def pid(self) -> int:
            return os.getpid()

    async def readyz(request: Request) -> JSONResponse:
        return JSONResponse({"experts": {name: {"ready": True} for name in config.experts}})

    async def hop(request: Request) -> JSONResponse:
        logging.getLogger("signalbox.standin").warning("a line from a replica")
        return JSONResponse({"pid": await request.app.state.expert.pid.remote(), "store": store_url})

    starlette = Starlette(routes=[Route("/readyz", readyz), Route("/hop", hop)])

    @serve.deployment(ray_actor_options={"num_cpus": 0.01}, num_replicas=config.server.gateways)
    @serve.ingress(starlette)
    class Gateway:
        def __init__(self, handle) -> None:  # type: ignore[no-untyped-def]
            starlette.state.expert = handle

    return Gateway.bind(Expert.bind())


if __name__ == "__main__":
    path = Path(sys.argv[1])
    sys.exit(serve_forever(path, load_config(path), build_app=build_app))
