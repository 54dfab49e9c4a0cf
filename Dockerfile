# An image for training on NVIDIA GPUs: docker build -t mantis-lite . && docker run --gpus all --shm-size 8g mantis-lite
# Pictures, recipes and runs are mounted: -v "$PWD:/data" -v "$HOME/.cache/huggingface:/cache"
# Torch's wheels bring their own CUDA libraries, so the smallest image is enough; flash-attn would need a -devel one.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# Triton compiles a launcher with a C compiler when it first runs a kernel.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/mantis_lite
ENV PATH=/opt/mantis_lite/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/cache

COPY pyproject.toml README.md LICENSE /src/
COPY mantis_lite /src/mantis_lite
COPY recipes /src/recipes
RUN cd /src && pip install --no-cache-dir '.[gpu,serve]'

WORKDIR /data
ENTRYPOINT ["mantis-lite"]
CMD ["--help"]
