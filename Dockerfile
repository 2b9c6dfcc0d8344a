# docker build -t smart . && docker run -p 8000:8000 -e SMART_API_KEY=... -v smart-cache:/cache smart [MODEL] [options]
FROM python:3.12-slim-trixie AS build

# All variants of the CPU kernels are compiled here; the image that runs has no compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml CMakeLists.txt LICENSE /smart/
COPY src /smart/src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /smart

FROM python:3.12-slim-trixie
# pip's default torch on Linux is the CUDA build; --build-arg TORCH_INDEX=URL takes it from another index, such as PyTorch's of CPU builds.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.6"
COPY --from=build /wheel /wheel
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "$(ls /wheel/*.whl)[serve,vision]" \
    && useradd --create-home smart && install -d -o smart /cache
USER smart
ENV SMART_CACHE=/cache HF_HOME=/cache/huggingface
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=30s --timeout=10s \
    CMD ["python", "-m", "smart_decoding.cli.health"]
ENTRYPOINT ["smart", "serve", "--host", "0.0.0.0"]
