# trim.sh VARIANT SITE_PACKAGES: removes what serving does not read from an installed torch, and
# makes sure that an image for CPUs carries nothing of CUDA.
set -eu
variant=$1
cd "$2"

rm -rf torch/include torch/share torch/test
# Importing torch looks for this one program of the folder.
find torch/bin -mindepth 1 ! -name torch_shm_manager -exec rm -rf {} +

[ "$variant" = cpu ] || exit 0

if [ -e torch/lib/libtorch_cuda.so ] || [ -e nvidia ]; then
    echo "VARIANT=cpu, but this torch is a CUDA build: set TORCH_INDEX_URL to PyTorch's CPU builds" >&2
    exit 1
fi
# torchvision's own operators (CUDA and JPEG on the GPU) do not load beside a CPU build of torch.
rm -f torchvision.libs/libcu* torchvision.libs/libnv*
