from tests.helpers.queues import place  # noqa: F401
