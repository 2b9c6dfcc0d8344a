# docker build -t smart . && docker run -p 8000:8000 -e SMART_API_KEY=... -v smart-cache:/cache smart [MODEL] [options]
FROM python:3.12-slim-trixie

# g++ compiles the CPU kernels at first use, for the machine that they run on; the cache keeps them.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# pip's default torch on Linux is the CUDA build; --build-arg TORCH_INDEX=URL takes it from another index, such as PyTorch's of CPU builds.
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.6"
COPY pyproject.toml LICENSE /smart/
COPY src /smart/src
RUN pip install --no-cache-dir "/smart[serve,vision]" && rm -r /smart \
    && useradd --create-home smart && install -d -o smart /cache
USER smart
ENV SMART_CACHE=/cache HF_HOME=/cache/huggingface
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=300s --interval=10s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=5)"]
ENTRYPOINT ["smart", "serve", "--host", "0.0.0.0"]
