"""When this process began to import diffray. Imports nothing of weight itself, and is imported first."""

import time

ARRIVED = time.monotonic()
