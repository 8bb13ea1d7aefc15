# The serving image: proxy and collector, no torch. Build: docker build -t ratchet .
# Run: docker run -p 127.0.0.1:4000:4000 -v ratchet:/data -e RATCHET_KEY=… ratchet   (see configs/docker.yaml)
FROM python:3.11-slim AS build
WORKDIR /build
COPY locks/core.txt pyproject.toml README.md ratchet.py ./
COPY proxy proxy
COPY collector collector
COPY optimize optimize
RUN python -m venv /opt/ratchet \
 && /opt/ratchet/bin/pip install --no-cache-dir --no-deps --require-hashes -r core.txt \
 && /opt/ratchet/bin/pip install --no-cache-dir --no-deps .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --home-dir /data ratchet && install -d -o ratchet -g ratchet -m 0700 /data
COPY --from=build /opt/ratchet /opt/ratchet
COPY configs/docker.yaml /etc/ratchet.yaml
ENV PATH=/opt/ratchet/bin:$PATH RATCHET_CONFIG=/etc/ratchet.yaml RATCHET_DATA_DIR=/data PYTHONUNBUFFERED=1
USER ratchet
WORKDIR /data
VOLUME /data
EXPOSE 4000
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:4000/healthz', timeout=2)"]
ENTRYPOINT ["ratchet"]
CMD ["serve"]
