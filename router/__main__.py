"""python -m router --config FILE [--exit-with-stdin]: composes the router, and takes it apart again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys

from legato.v1 import inference_pb2_grpc, worker_pb2_grpc
from router.cluster import ClusterService, ControlService
from router.constraints import Constraints
from router.inference import InferenceService
from router.line import Line
from router.meter import Meter
from router.moves import Balancer
from router.placer import Placer
from router.registry import Registry
from service import logs
from service.channel import channel
from service.config import RouterConfig
from service.host import Host
from service.model_source import resolve_model
from service.registry import Watcher, check_redis
from service.run import arguments, run_service
from service.tokenizer import load_tokenizer
from service.tracing import Spans
from telemetry.setup import setup

logger = logs.get(__name__)

INFERENCE, CLUSTER, CONTROL = "legato.v1.Inference", "legato.v1.Cluster", "legato.v1.Worker"
READY_LOOK_S = 60.0  # membership wakes it; this only bounds a wait


async def serve(config: RouterConfig, stop: asyncio.Event) -> None:
    """Until `stop` is set. Raises InvalidConfiguration when the port is taken or Redis cannot be reached."""
    router_id = config.router_id or f"router-{secrets.token_hex(4)}"
    name = config.telemetry.service_name or "legato-router"
    logs.setup(name, config.telemetry.log_level)
    telemetry = setup(name, config.telemetry.otlp_endpoint, router_id)
    key = config.cluster_key
    registry = Registry(
        router_id,
        dial=lambda address: channel(address, key, config.max_message_bytes),
        read_tokenizer=lambda model_path: load_tokenizer(resolve_model(model_path)),
    )
    line = Line(config.max_waiting)
    placer = Placer(registry, line, config.decode_prefills_tokens)
    constraints = Constraints()
    inference = InferenceService(
        registry, placer, constraints, Meter(telemetry), Spans(telemetry), config.default_timeout_s
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(telemetry.close)
        stack.push_async_callback(constraints.close)
        host = Host(
            config.host,
            config.port,
            internal_key=key,
            api_keys=config.api_keys,
            max_message_bytes=config.max_message_bytes,
            drain_s=config.drain_s,
        )
        await check_redis(config.redis_url)
        stack.push_async_callback(registry.close)
        watcher = await stack.enter_async_context(Watcher(config.redis_url, config.cluster))
        cluster = ClusterService(registry, line, inference, lambda: watcher.reachable)
        control = ControlService(registry, line, inference)
        host.add(inference_pb2_grpc.add_InferenceServicer_to_server, inference, INFERENCE)
        host.add(inference_pb2_grpc.add_ClusterServicer_to_server, cluster, CLUSTER)
        host.add(worker_pb2_grpc.add_WorkerServicer_to_server, control, CONTROL, internal=True)
        await stack.enter_async_context(host)  # a client that waits for this address calls at once
        host.set_serving(CLUSTER, True)
        host.set_serving(CONTROL, True)
        registry.spawn(registry.follow(watcher.snapshots()), name="follow the registry")
        registry.spawn(_tell_health(registry, host), name="health")
        registry.spawn(Balancer(registry).run(), name="balance")
        logger.info("%s listens on %s", router_id, host.address)
        await stop.wait()
        inference.draining = True
        logger.info("%s is stopping; %d requests end first", router_id, inference.meter.running_requests)


async def _tell_health(registry: Registry, host: Host) -> None:
    """SERVING while at least one model has a decode worker: see Registry.serves."""
    was = False
    while True:
        seen = registry.membership.version
        serves = registry.serves()
        if serves != was:
            was = serves
            logger.info("%s", "ready" if serves else "not ready: no decode worker is there")
            await host.set_serving(INFERENCE, serves)
        await registry.membership.beyond(seen, READY_LOOK_S)


def main() -> int:
    config, exit_with_stdin = arguments("Legato's router: the front door of a cluster", RouterConfig, os.environ)
    return run_service(lambda stop: serve(config, stop), exit_with_stdin=exit_with_stdin)


if __name__ == "__main__":
    sys.exit(main())
