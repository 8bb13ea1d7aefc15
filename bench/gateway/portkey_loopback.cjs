// Portkey's gateway listens on all interfaces and has no option for it: preloaded, this keeps it on loopback.
const net = require('node:net');

const listen = net.Server.prototype.listen;

net.Server.prototype.listen = function (first, ...rest) {
  const options = first !== null && typeof first === 'object' ? first : { port: Number(first) };
  const callback = rest.find((one) => typeof one === 'function');
  return listen.call(this, { ...options, host: '127.0.0.1' }, callback);
};
