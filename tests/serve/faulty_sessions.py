"""A worker's session with a judge that fails as the prompt says."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

from safegen.serve.engine.process import open_stack


@contextmanager
def open_faulty(config, spec):
    """Yield the session of a stack that the server itself would open; only its judge is faulty."""
    with open_stack(config, spec) as session:
        judge = session.guarded.guards[-1].judge
        detect, generate = judge.detect, session.generate

        def faulty_generate(requests, report):
            prompts = " ".join(request.prompt for request in requests)

            def faulty_detect(images):
                if "hang" in prompts:
                    time.sleep(1000)
                if "kill" in prompts:
                    os.kill(os.getpid(), signal.SIGKILL)
                if "memory" in prompts:
                    raise MemoryError
                return detect(images)

            judge.detect = faulty_detect
            return generate(requests, report)

        session.generate = faulty_generate
        yield session
