# The service: oag-transform serve, behind which nothing is kept.
#   CPU:   docker build -t oag-transform .
#   CUDA:  docker build -t oag-transform:cuda --build-arg COMPUTE=cuda .
#   run:   docker run --rm -p 127.0.0.1:8000:8000 oag-transform [--model ... further options]

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels

FROM python:3.12-slim
# cpu: PyTorch's own index, whose wheels have no CUDA and are small; cuda: PyPI, whose wheels bring it
ARG COMPUTE=cpu
RUN case "$COMPUTE" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://pypi.org/simple ;; \
      *) echo "COMPUTE must be cpu or cuda, got $COMPUTE" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir --index-url "$index" "torch>=2.6" "torchvision>=0.21"
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[serve]"
RUN useradd --create-home server
USER server
WORKDIR /home/server
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# 0.0.0.0 is the container's own network: what is published of it, -p or compose.yaml says
ENTRYPOINT ["oag-transform", "serve", "--host", "0.0.0.0"]
CMD ["--model", "efficientnet-lite0"]
