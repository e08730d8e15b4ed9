# For GPU nodes: docker build -t lightning-t2i . && docker run --gpus all --ipc=host -v "$PWD/runs:/app/runs" \
#                    lightning-t2i fit --config configs/quickstart.yaml --config configs/trainer/gpu.yaml --run gpu \
#                    --trainer.val_check_interval 90   (docs/scaling.md)
# torch's wheel carries the CUDA libraries; the host gives the driver. Not built or run yet.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# torch.compile calls a C compiler. The image has neither git nor .git: env.json of a run names no commit.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /app
ARG TORCH_SPEC=torch>=2.11
ENV TORCH_SPEC=${TORCH_SPEC} PIP_NO_CACHE_DIR=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY . .
RUN ./run setup
ENV PATH=/app/.venv/bin:${PATH}

ENTRYPOINT ["./run"]
CMD ["--help"]
