# symphony-moe for one or several NVIDIA GPUs. The host needs its driver and the NVIDIA Container Toolkit;
# torch brings CUDA's libraries with it.
#
#     docker build -t symphony-moe .
#     docker run --gpus all -v "$PWD:/work" --user "$(id -u):$(id -g)" symphony-moe plan recipe.yaml
#
# The version of Python is the one that constraints.txt was resolved for. No test builds this image: what was
# checked is its syntax, and that the pins resolve.
FROM python:3.11-slim-bookworm

WORKDIR /package
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt '.[adapters,gguf,lm-eval,sentencepiece]' \
    && useradd --create-home --uid 1000 symphony \
    && mkdir --mode 1777 /cache /work

# Anyone may write there: `--user` may name somebody whom the image does not know, who has no home.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache HOME=/cache PYTHONUNBUFFERED=1
USER symphony
WORKDIR /work
ENTRYPOINT ["symphony"]
