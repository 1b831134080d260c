# What `make sft-demo` needs. With a GPU: build with --build-arg LAUNCH=single_gpu, and run with --gpus all
FROM python:3.11-slim
ARG LAUNCH=cpu
ENV LAUNCH=$LAUNCH PIP_NO_CACHE_DIR=1
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /ma-sft
COPY Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY accelerate_configs accelerate_configs
COPY recipes recipes
COPY ma_sft ma_sft
RUN make env
CMD ["make", "sft-demo"]
