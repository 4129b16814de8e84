"""One image of a shard: its source pictures and prompts fetched, made by the engine, checked and encoded.

Reading, asking for prompts and encoding run in threads; the denoising loop never waits for them.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffray.model.config import VAEConfig
from diffray.model.encoding import encode_image
from diffray.model.errors import GenerationError, InvalidRequest, JobError
from diffray.model.request import ImageRequest
from diffray.model.tickets import Result

from ..config import JobConfig
from ..inputs.sources import Ready, Sources
from ..models import OpenModel
from ..outputs.index import thumbnail
from ..outputs.parts import Made, Outcome, Rejected
from ..outputs.sample import Sample
from ..scores import Examiner, Refused, broken
from ..terms.image import PlannedImage
from .tally import ENCODE, ENGINE, TEXT, Tally
from .texts import Texts

ENCODERS = READERS = 4
ASKERS = 16
"""Images that wait for their prompts at the same time."""


class WorkerBroken(Exception):
    """The engine failed in a way that is no row's own error: this process must end, its work be redone."""


class Maker:
    """Makes images with one engine, as many at once as are asked for.

    Args:
        name: of the model, as the files say it.
        vae: the model's autoencoder.
        sample: of whose images a thumbnail is made.
        tally: told which stage images are in.
        texts: encodes the prompts, if not the engine itself.
    """

    def __init__(
        self,
        config: JobConfig,
        model: OpenModel,
        sources: Sources,
        examiner: Examiner,
        sample: Sample,
        tally: Tally,
        *,
        name: str,
        vae: VAEConfig,
        texts: Texts | None = None,
    ) -> None:
        self._config, self._model, self._sources = config, model, sources
        self._examiner, self._sample, self._tally = examiner, sample, tally
        self._name, self._vae, self._texts = name, vae, texts
        self._encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encode")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._askers = ThreadPoolExecutor(ASKERS, thread_name_prefix="text")
        self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def make(self, image: PlannedImage, spent: dict[str, float]) -> Outcome:
        """How an image ended; adds the seconds of each phase to `spent`.

        Raises:
            WorkerBroken: the process is not to be trusted any more.
            JobError: something that all images need is not there.
        """
        needed = self._sources.needed(image)
        if not needed and self._texts is None:
            return await self._outcome(_plain(image), spent)
        loop = asyncio.get_running_loop()
        async with self._room(loop):
            if not needed:
                return await self._outcome(_plain(image), spent)
            began = time.monotonic()
            try:
                ready = await loop.run_in_executor(self._readers, self._sources.ready, image)
            except InvalidRequest as error:
                return Rejected(image, "source", error.field, error.reason, 1)
            except (JobError, OSError):
                raise  # the storage: no row's fault
            except Exception as error:  # of preparing what was read
                return Rejected(image, "source", None, f"{type(error).__name__}: {error}", 1)
            spent["read"] = time.monotonic() - began
            return await self._outcome(ready, spent)

    def close(self) -> None:
        """End the threads."""
        for pool in (self._encoders, self._readers):
            pool.shutdown()
        self._askers.shutdown(wait=False, cancel_futures=True)

    def _room(self, loop: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
        """Keeps the pictures and prompts in memory few, and so much ahead that the engine never waits: those in
        the engine, and a few that wait for it."""
        if self._gate is None or self._gate[0] is not loop:
            self._gate = loop, asyncio.Semaphore(2 * self._model.engine.batch_size + READERS)
        return self._gate[1]

    async def _computed(self, ready: Ready) -> Result:
        """What the engine makes of it: a picture, or latents."""
        engine, request, task = self._model.engine, ready.request, self._config.task
        began = time.monotonic()
        if task == "encode":
            assert request.init_image is not None, "the task needs one"
            size = {"width": request.width, "height": request.height}
            latents = await asyncio.wrap_future(engine.encode(request.init_image, **size))
            return Result(None, latents, request, {"encode_latents": time.monotonic() - began})
        if task == "decode":
            import torch

            picture = await asyncio.wrap_future(engine.decode(torch.from_numpy(ready.latents)))
            return Result(picture, None, request, {"decode": time.monotonic() - began})
        return await asyncio.wrap_future(engine.submit(request).future)

    async def _prefetch(self, request: ImageRequest, spent: dict[str, float]) -> None:
        """Have the prompts encoded before the engine begins with the image: it would stand still meanwhile."""
        began = time.monotonic()
        with self._tally.inside(TEXT):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._askers, self._model.engine.prefetch, request)
        spent["text"] = time.monotonic() - began

    async def _outcome(self, ready: Ready, spent: dict[str, float]) -> Outcome:
        image = ready.image
        try:
            if self._texts is not None:
                await self._prefetch(ready.request, spent)
            with self._tally.inside(ENGINE):
                result = await self._computed(ready)
        except InvalidRequest as error:
            return Rejected(image, "generate", error.field, error.reason, 1)
        except GenerationError as error:
            if self._model.broken is not None:
                raise WorkerBroken(str(error)) from error
            return Rejected(image, "generate", None, str(error), 1)
        except JobError:
            raise  # no text encoders: neither this row nor this process is to blame
        except Exception as error:
            raise WorkerBroken(f"{type(error).__name__}: {error}") from error
        spent.update(result.timings)
        try:
            with self._tally.inside(ENCODE):
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._encoders, self._finished, ready, result, spent)
        except Refused as error:
            return Rejected(image, "check", error.column, error.reason, 1)
        except Exception as error:
            if broken(error):
                raise WorkerBroken(f"{type(error).__name__}: {error}") from error
            return Rejected(image, "encode", None, str(error) or type(error).__name__, 1)

    def _finished(self, ready: Ready, result: Result, spent: dict[str, float]) -> Made:
        """A picture looked at and encoded; runs in a thread.

        Raises:
            Refused: the checks do not let it pass.
        """
        image, picture, request, model = ready.image, result.image, result.request, self._model
        if picture is None:
            return self._latents(ready, result)
        began = time.monotonic()
        scores = self._examiner.examine(picture, request)
        checked = time.monotonic()
        encoding = self._config.encoding
        data = encode_image(
            picture,
            request,
            format=encoding.format,
            quality=encoding.quality,
            model=self._name,
            model_checksum=model.checksum,
            adapter_checksums=model.adapters,
        )
        small = thumbnail(picture) if image.id in self._sample else None
        spent |= {"check": checked - began, "encode": time.monotonic() - checked}
        sources = ready.columns(*picture.size)
        return Made(image, request, data, hashlib.sha256(data).hexdigest(), scores, small, sources=sources)

    def _latents(self, ready: Ready, result: Result) -> Made:
        """Latents as bytes, with what is needed to read them."""
        assert result.latents is not None, "the engine gives one or the other"
        image, dtype, request = ready.image, self._config.encoding.latents, result.request
        array = result.latents.numpy().astype(np.dtype(dtype).newbyteorder("<"))
        if not np.isfinite(array).all():
            raise ValueError(f"latents do not fit {dtype}")
        data = array.tobytes()
        source = request.init_image
        small = thumbnail(source) if source is not None and image.id in self._sample else None
        height, width = (side * self._vae.factor for side in array.shape[1:])
        sources = ready.columns(width, height)
        facts = {
            "latents": data,
            "latents_shape": list(array.shape),
            "latents_dtype": dtype,
            "latents_scale": self._vae.scale,
        }
        return Made(image, request, data, hashlib.sha256(data).hexdigest(), {}, small, facts, sources)


def _plain(image: PlannedImage) -> Ready:
    """An image that is made from nothing but its request."""
    assert image.request is not None, "the plan's own rejections never come here"
    return Ready(image, image.request)
