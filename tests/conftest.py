import os

# Before JAX starts: a CPU that shows eight devices, so that one process tests one and many.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis

hypothesis.settings.register_profile("ci", deadline=None, derandomize=False, max_examples=40)
hypothesis.settings.load_profile("ci")
