# CPU:   docker build -t tahoex1 .
# CUDA:  docker build -t tahoex1:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
# Use:   docker run --rm -v "$PWD:/work" tahoex1 embed cells.h5ad embedded.h5ad --model MODEL     (CUDA: add --gpus all)
# `make check-docker` runs these steps without Docker.
FROM python:3.11-slim-bookworm

# torch.compile and Triton call a compiler when they run.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# torch by itself, first: a change of the package leaves this layer as it is. PyPI's torch for Linux brings CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/tahoex1
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH_INDEX" torch

COPY LICENSE README.md setup.cfg pyproject.toml ./
COPY tahoex1_hf ./tahoex1_hf
RUN pip install --no-cache-dir -c constraints.txt '.[data,train,evaluate,cards,drugs,s3]'

# Any user may run it (`--user "$(id -u)"`): what the libraries write goes to /cache, which may be a volume.
RUN mkdir -m 1777 /cache /work && useradd --create-home tahoex1
ENV HF_HOME=/cache/huggingface \
    NUMBA_CACHE_DIR=/cache/numba \
    MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
USER tahoex1
WORKDIR /work
ENTRYPOINT ["tahoex1"]
CMD ["--help"]
