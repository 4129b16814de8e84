"""Which replica makes an image: one that holds its model, unless all of these have enough to do and another has not."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Set
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

UNUSED_SECONDS = 10.0
"""Without an image after which a replica's models may give way to a busy one; sooner, two models would drive each
other out in turns."""


class ModelRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """The router of an ingress when there are several models.

    Serve's own one stays with the replicas that hold a model until their queues are full; ours never are, as images
    wait in the engines, where it is fair. So this one looks at how many images a replica has.

    Attributes:
        busy: images, waiting or running, that are enough for a replica.
        models: that a replica holds at once.
    """

    def initialize_state(self, *, busy: float = 16.0, models: int = 1, **_: Any) -> None:
        """Serve calls it with the deployment's `request_router_kwargs`."""
        self.busy, self.models = busy, models
        self._sent: dict[ReplicaID, OrderedDict[str, None]] = {}
        """The models last asked of each replica: what it tells about itself is a second or two old."""
        self._used: dict[ReplicaID, float] = {}
        """When each was last sent something."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Lists of replicas, the best list first; of a list Serve takes the replica with the least to do."""
        model = pending_request.metadata.multiplexed_model_id if pending_request is not None else ""
        if not model:
            return [candidate_replicas]
        holders = [replica for replica in candidate_replicas if model in self._held(replica)]
        others = [replica for replica in candidate_replicas if replica not in holders]
        if not holders:
            fewest = min((len(self._held(replica)) for replica in others), default=0)
            return [[replica for replica in others if len(self._held(replica)) == fewest]]
        least = min(map(self._load, holders))
        spare = [replica for replica in others if self._spare(replica, least)] if least >= self.busy else []
        return [spare, holders] if spare else [holders]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve calls it after each request that it sent."""
        model = pending_request.metadata.multiplexed_model_id
        if not model:
            return
        self._used[replica_id] = time.monotonic()
        sent = self._sent.setdefault(replica_id, OrderedDict())
        sent[model] = None
        sent.move_to_end(model)
        while len(sent) > self.models:
            sent.popitem(last=False)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Serve calls it for each that is lost."""
        self._sent.pop(replica_id, None)
        self._used.pop(replica_id, None)
        super().on_replica_actor_died(replica_id)

    def _held(self, replica: RunningReplica) -> Set[str]:
        """The models that a replica has, or will have when it has done what was sent to it."""
        sent = self._sent.get(replica.replica_id, OrderedDict()).keys()
        return sent if len(sent) >= self.models else sent | replica.multiplexed_model_ids

    def _load(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def _spare(self, replica: RunningReplica, least: int) -> bool:
        """Whether another model may come here without driving out one that is in use."""
        load = self._load(replica)
        if len(self._held(replica)) < self.models:
            return load <= least // 2
        unused = time.monotonic() - self._used.get(replica.replica_id, -UNUSED_SECONDS)
        return not load and unused >= UNUSED_SECONDS
