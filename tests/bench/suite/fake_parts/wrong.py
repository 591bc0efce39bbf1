"""A kernel with wrong numbers."""


def plan():
    return ["scan/plain/xla/float32"]


def measure(missing, earlier):
    for key in missing:
        yield {
            "key": key,
            "check": "scan/plain",
            "backend": "xla",
            "dtype": "float32",
            "error": 0.5,
            "gradient_error": 2.0,
            "worst_gradient": "u",
            "tolerance": 1e-4,
            "right": False,
        }
