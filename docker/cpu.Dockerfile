# docker build -f docker/cpu.Dockerfile -t chipset:cpu .
# docker run -p 127.0.0.1:8080:8080 -v chipset-cache:/data chipset:cpu
FROM python:3.11-slim AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/chipset \
    && /opt/chipset/bin/pip install --no-cache-dir -c constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu torch \
    && /opt/chipset/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim
COPY --from=build /opt/chipset /opt/chipset
RUN useradd --create-home chipset && mkdir /data && chown chipset /data
USER chipset
ENV PATH=/opt/chipset/bin:$PATH CHIPSET_CACHE=/data/chipset HF_HOME=/data/huggingface
EXPOSE 8080
VOLUME /data
ENTRYPOINT ["chipset"]
CMD ["serve", "--backend", "cpu", "--host", "0.0.0.0"]
