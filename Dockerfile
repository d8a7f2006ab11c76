# The image that manifests/base runs: `docker build -t colocate:0.1.0 .`
FROM python:3.13-slim
WORKDIR /src
COPY . .
# The locked versions without their hashes, as constraints: a directory that is installed has no hash to give.
RUN sed -e 's/ *\\$//' -e '/^ *--hash/d' requirements.lock > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt . \
    && rm -r /src /tmp/constraints.txt
WORKDIR /
USER 65534
ENTRYPOINT ["colocate"]
