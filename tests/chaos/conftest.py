"""The same places and servers as the tests of the pipelines."""

from tests.pipelines.conftest import place as place
from tests.pipelines.conftest import ray_session as ray_session
from tests.pipelines.conftest import s3 as s3
