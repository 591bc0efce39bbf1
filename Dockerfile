# FlowHN in JAX, for CPUs or NVIDIA GPUs:
#   docker build -t flowhn .
#   docker build -t flowhn-gpu --build-arg ACCELERATOR=gpu .
#   docker run -v "$PWD/runs:/runs" flowhn train --config=flowhn_tiny --workdir=/runs/tiny
#   docker run --gpus=all -v "$PWD/runs:/runs" flowhn-gpu train --config=flowhn_135m --workdir=/runs/135m
# CUDA's libraries come with the Python packages; the host needs NVIDIA's driver and container
# toolkit.
FROM python:3.12-slim

# cpu, or an extra of pyproject.toml: gpu or tpu.
ARG ACCELERATOR=cpu

WORKDIR /flowhn
# The dependencies first: this layer stays when only the code changes.
COPY requirements.txt requirements-gpu.txt requirements-tpu.txt ./
RUN if [ "$ACCELERATOR" = cpu ]; then list=requirements.txt; \
    else list="requirements-$ACCELERATOR.txt"; fi && \
    pip install --no-cache-dir -r "$list"

COPY pyproject.toml setup.py README.md LICENSE ./
COPY flowhn_jax flowhn_jax
COPY kernels kernels
COPY configs configs
RUN pip install --no-cache-dir --no-deps .

WORKDIR /
ENTRYPOINT ["flowhn"]
CMD ["--help"]
