# The converter without a GPU, as a container. docs/guides/install.md says how to build and to run it.
FROM python:3.12-slim

COPY constraints.txt /src/
# First, because the package alone would bring PyTorch with CUDA: 3 GB to download, and nothing of it is used.
RUN pip install --no-cache-dir --constraint /src/constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu torch

COPY pyproject.toml README.md LICENSE MANIFEST.in /src/
COPY kernels /src/kernels
COPY convert_w4a8 /src/convert_w4a8
# What is kept between runs goes to /cache: a volume, if it is to outlive the container. Anybody may write there, since
# `docker run --user` gives the process a number that this image does not know.
RUN pip install --no-cache-dir --constraint /src/constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu /src \
    && rm -rf /src \
    && useradd --create-home --uid 1000 w4a8 \
    && mkdir --mode=1777 /cache /data
ENV HF_HOME=/cache/huggingface NUMBA_CACHE_DIR=/cache/numba
USER w4a8
WORKDIR /data
ENTRYPOINT ["w4a8-convert"]
CMD ["--help"]
